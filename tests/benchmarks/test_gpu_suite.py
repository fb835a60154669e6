"""GPU suite: its script keeps its time limit and all finished results; its cases are tested on a CPU.

The script runs a stand-in for Python.
"""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks import accuracy, gpu_cases
from benchmarks.gpu_cases import Candidate, RecipeCase

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu_suite.sh"
STAGES = ["ceilings", "smoke", "steps", "candidates", "tests", "peers", "accuracy"]

STAND_IN = r"""#!/usr/bin/env bash
echo "$*" >>"$CALLS"
file() { while [[ $1 != "$option" ]]; do shift; done; printf '%s' "$2"; }
case "$*" in
  *"torch.cuda.is_available"*) echo "$GPU" ;;
  "-c import xdist") exit 1 ;;
  *" prepare --source "*) option=--source; cp "$(file "$@")" "$CALLS.source" ;;
  *"benchmarks train"*) option=--json; echo '{"rows": [1]}' >"$(file "$@")" ;;
  *" train "*)
    option=--out; folder=$(file "$@"); mkdir -p "$folder"
    touch "$folder"/{last.ckpt,config.toml,metrics.csv,summary.json}
    ;;
  *" --json "*) option=--json; echo '{"rows": [1]}' >"$(file "$@")" ;;
esac
"""


class Suite:
    """Runner of the script, with a stand-in for Python that records its calls."""

    def __init__(self, folder: Path) -> None:
        self.out, self.calls_file, self.python = folder / "results", folder / "calls", folder / "python"
        self.python.write_text(STAND_IN)
        self.python.chmod(0o755)
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in ("DATA", "WHEELS")},
            "PYTHON": str(self.python),
            "CALLS": str(self.calls_file),
            "GPU": "a stand-in",
        }

    def inject(self, pattern: str, commands: str) -> None:
        """Make the stand-in first run `commands` if its arguments match `pattern`."""
        lines = self.python.read_text().split("\n", 1)
        self.python.write_text(f'{lines[0]}\ncase "$*" in {pattern}) {commands} ;; esac\n{lines[1]}')

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [SCRIPT, *arguments],
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        """Return exit code, stdout and stderr of the script for `self.out`."""
        process = self.start(str(self.out), *arguments, **environment)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def wait_for_sleep(self) -> int:
        """Return the process id that a sleeping stand-in has written."""
        file = self.calls_file.with_suffix(".sleeps")
        for _ in range(600):
            if file.exists() and (number := file.read_text().strip()):
                return int(number)
            time.sleep(0.05)
        raise TimeoutError

    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines()

    def packed(self) -> dict[str, bytes]:
        """Files in the tar, by their path in it."""
        with tarfile.open(f"{self.out}.tar") as tar:
            return {
                str(Path(member.name).relative_to("results")): tar.extractfile(member).read()
                for member in tar
                if member.isfile()
            }


def stage_and_result(line: str) -> tuple[str, str]:
    """Stage and result in a line of the table."""
    return line[:11].strip(), line[12:57].strip()


@pytest.fixture
def suite(tmp_path):
    return Suite(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [
        ((), {}, "name a folder"),
        (("--rehearse", "smoke"), {}, "smoke is a stage"),
        (("OUT", "--seconds"), {}, "--seconds"),
        (("OUT", "--seconds", "1.5"), {}, "--seconds 1.5"),
        (("OUT", "--seconds", "10"), {}, "--seconds 10"),
        (("OUT", "--fast"), {}, "--fast"),
        (("OUT", "step"), {}, "no stage step"),
        (("OUT",), {"DATA": "nowhere/part-*"}, "nowhere/part-*"),
        (("OUT",), {"WHEELS": "nowhere"}, "nowhere"),
        (("OUT",), {"PYTHON": "nowhere/python"}, "nowhere/python"),
        (("OUT",), {"GPU": ""}, "--rehearse"),
    ],
)
def test_invalid_arguments_are_one_line_usage_errors(suite, tmp_path, arguments, environment, named):
    process = suite.start(*(str(tmp_path / word) if word == "OUT" else word for word in arguments), **environment)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert named in err
    assert err.count("\n") == 1
    assert not (tmp_path / "OUT.tar").exists()


def test_all_stages_run_in_order_and_pass(suite, tmp_path):
    archive = bytes(range(256)) * 41
    for number, name in enumerate(("aa", "ab", "ac")):
        (tmp_path / f"c i.tar.xz.part-{name}").write_bytes(archive[4000 * number : 4000 * (number + 1)])
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels/tomli_w.whl").touch()
    code, out, err = suite.run(DATA=f"{tmp_path}/c i.tar.xz.part-*", WHEELS=str(tmp_path / "wheels"))
    assert (code, err) == (0, "")
    heading, *lines = suite.packed()["stages.txt"].decode().splitlines()
    assert heading.startswith("a stand-in, ")
    assert [stage_and_result(line) for line in lines] == [
        *((stage, "passed") for stage in STAGES[:-1]),
        ("accuracy", "passed, 15 of 15 trainings"),
    ]
    assert all(line in out for line in lines)
    assert f"install --quiet --no-index --no-deps --upgrade --target {suite.out}.packages" in suite.calls()[0]
    assert suite.calls()[0].endswith("/wheels/tomli_w.whl")
    assert {f"{stage}.json" for stage in ("ceilings", "steps", "candidates", "peers")} <= suite.packed().keys()
    assert (suite.calls_file.with_suffix(".source")).read_bytes() == archive


def test_only_small_files_of_each_training_are_packed(suite, tmp_path):
    """These are summary, settings and metrics. Trainings run in order of priority."""
    (tmp_path / "data/cifar10").mkdir(parents=True)
    (tmp_path / "data/cifar10/meta.json").touch()
    assert suite.run("accuracy", DATA=str(tmp_path / "data"))[0] == 0
    trainings = [call.split(" --out")[0].split(" train ")[1] for call in suite.calls() if " train " in call]
    assert trainings[:6] == [
        "speedrun --model speednet --seed 0",
        "fast --model resnet20 --seed 0",
        "fast --model resnet20 --seed 0 --resolutions 32",
        "fast --model resnet56 --seed 0",
        "baseline --model resnet20 --seed 0",
        "paper --model resnet20 --seed 0",
    ]
    assert trainings[6:10] == [f"fast --model resnet20 --seed {seed}" for seed in range(1, 5)]
    assert len(trainings) == len(set(trainings)) == 15
    names = sorted(Path(name).name for name in suite.packed() if name.startswith("accuracy/"))
    assert names == ["config.toml"] * 15 + ["metrics.csv"] * 15 + ["summary.json"] * 15
    assert not list(Path(f"{suite.out}.runs").iterdir())


def test_suite_without_cifar10_skips_only_the_accuracy_stage(suite):
    code, out, _ = suite.run()
    assert code == 0
    assert "accuracy    left out: DATA does not name CIFAR-10" in out
    assert not any(" train fast" in call for call in suite.calls())


def test_timed_out_stage_keeps_its_partial_output(suite):
    suite.inject('*"gpu_cases steps"*', 'echo half; echo \'{"rows": []}\' >"${@: -1}"; sleep 60')
    began = time.monotonic()
    code, out, err = suite.run("--seconds", "13", "smoke", "steps", "candidates", "tests")
    assert time.monotonic() - began < 13
    assert code == 1
    assert err == "not passed: steps candidates tests\n"
    results = [stage_and_result(line) for line in out.splitlines()]
    assert {("smoke", "passed"), ("steps", "cut"), ("tests", "left out: no time")} <= set(results)
    packed = suite.packed()
    assert json.loads(packed["steps.json"]) == {"rows": []}
    assert packed["logs/steps.log"] == b"half\n"
    assert len([name for name in packed if name.startswith("smoke/")]) == 6


def test_timed_out_tests_have_time_to_report_failures(suite):
    """Pytest workers that compile take 10 seconds to stop; only then does pytest write its report."""
    suite.inject('*"-m pytest"*', "trap 'sleep 7; echo FAILED; exit 2' INT; sleep 60")
    assert suite.run("--seconds", "33", "tests")[0] == 1
    assert b"FAILED" in suite.packed()["logs/tests.log"]


def test_skipped_tests_are_counted(suite):
    suite.inject("*pytest*", "echo '==== 44 passed, 24 skipped, 1 warning in 3.00s ===='")
    code, out, _ = suite.run("tests")
    assert code == 0
    assert ("tests", "passed, 44 passed, 24 skipped") in map(stage_and_result, out.splitlines())


def test_failed_stage_is_reported_and_the_next_still_runs(suite):
    suite.inject('*"gpu_cases steps"*', "echo no such kernel >&2; exit 3")
    code, out, err = suite.run("steps", "candidates")
    assert (code, err) == (1, "not passed: steps\n")
    assert "no such kernel" in out
    assert "failed (exit 3)" in out
    assert {"candidates.json", "logs/steps.log"} <= suite.packed().keys()


def test_second_run_adds_to_the_results_of_the_first(suite):
    assert [suite.run(stage)[0] for stage in ("ceilings", "steps")] == [0, 0]
    packed = suite.packed()
    assert {"ceilings.json", "steps.json"} <= packed.keys()
    results = [stage_and_result(line) for line in packed["stages.txt"].decode().splitlines()]
    assert {("ceilings", "passed"), ("steps", "passed")} <= set(results)


def test_timed_out_training_is_left_out(suite, tmp_path):
    (tmp_path / "archive").touch()
    suite.inject('*"fast --model resnet20"*', "trap 'touch \"$CALLS.saved\"; exit 143' TERM; sleep 60 & wait")
    code, out, _ = suite.run("--seconds", "13", "accuracy", DATA=str(tmp_path / "archive"))
    assert code == 0
    assert "passed, 1 of 15 trainings" in out
    assert suite.calls_file.with_suffix(".saved").exists()
    assert [name for name in suite.packed() if name.endswith("summary.json")] == [
        "accuracy/speedrun-model-speednet-seed-0/summary.json"
    ]


def test_sigterm_keeps_finished_results_and_leaves_no_process(suite):
    suite.inject('*"gpu_cases candidates"*', 'echo $$ >"$CALLS.sleeps"; exec sleep 60')
    process = suite.start(str(suite.out), "steps", "candidates")
    sleeping = suite.wait_for_sleep()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "stopped" in err
    assert "steps.json" in suite.packed()
    assert not Path(f"/proc/{sleeping}").exists()


def test_sigkill_loses_only_the_running_training(suite, tmp_path):
    (tmp_path / "archive").touch()
    suite.inject('*"--seed 1"*', 'echo $$ >"$CALLS.sleeps"; exec sleep 60')
    process = suite.start(str(suite.out), "steps", "accuracy", DATA=str(tmp_path / "archive"))
    sleeping = suite.wait_for_sleep()
    process.kill()
    os.kill(sleeping, signal.SIGKILL)
    process.communicate(timeout=60)
    assert {"steps.json", "accuracy/fast-model-resnet20-seed-0/summary.json"} <= suite.packed().keys()


def test_tar_size_is_limited_despite_large_outputs(suite):
    suite.inject('*"gpu_cases ceilings"*', "head -c 20000000 /dev/zero; echo the end")
    suite.inject('*"gpu_cases steps"*', f"head -c 20000000 /dev/zero >'{suite.out}/huge'")
    assert suite.run("ceilings", "steps")[0] == 0
    packed = suite.packed()
    assert Path(f"{suite.out}.tar").stat().st_size <= 16 << 20
    assert packed["logs/ceilings.log"].endswith(b"the end\n")
    assert {"ceilings.json", "steps.json", "stages.txt"} <= packed.keys()


@pytest.mark.slow
def test_rehearsal_runs_every_stage(tmp_path):
    out = tmp_path / "results"
    process = subprocess.run(
        [SCRIPT, "--rehearse", out],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "NOTHING OF THIS IS A MEASUREMENT" in process.stdout
    with tarfile.open(f"{out}.tar") as tar:
        names = {str(Path(name).relative_to("results")) for name in tar.getnames()}
    assert {f"{name}.json" for name in ("ceilings", "steps", "candidates", "peers")} <= names
    assert {"tests.xml", "stages.txt", "accuracy/fast-model-resnet20-seed-0-data-shapes10/summary.json"} <= names
    summary = json.loads((out / "accuracy/fast-model-resnet20-seed-0-data-shapes10/summary.json").read_text())
    assert accuracy._exclusion(summary | {"data": "cifar10"}, "it") == (
        "it was trained with batch_size = 16, iterations = 4, which are not the settings of recipe fast"
    )


# --- the cases -----------------------------------------------------------------------------------------------------


SMALL = RecipeCase("fast", "resnet20", 128)  # 2 images on a CPU


@pytest.fixture
def measure(request, tmp_path, monkeypatch, data_root):
    """`code, report = measure("steps")`: rehearse a command with the cases that the test has set."""
    monkeypatch.setenv("FASTRESNET_DATA", str(data_root))
    if "gpu" not in request.keywords:
        monkeypatch.setattr(gpu_cases, "resolve_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(gpu_cases, "CASES", (SMALL,))

    def run(command):
        file = tmp_path / "cases.json"
        code = gpu_cases.main([command, "--json", str(file), "--rehearse"])
        return code, json.loads(file.read_text())

    return run


def test_failed_case_is_reported_and_the_next_is_measured(measure, monkeypatch):
    monkeypatch.setattr(gpu_cases, "CASES", (RecipeCase("fast", "resnet20", 1 << 20), SMALL))  # exceeds the data set
    code, report = measure("steps")
    assert code == 1
    (failed,) = report["failed"]
    assert failed == "fast/resnet20/b16384"
    (row,) = report["rows"]
    assert row["name"] == "fast/resnet20/b2"
    assert row["ms_per_step"] == pytest.approx(2000 / row["images_per_s"])
    assert report["environment"]["rehearsal"] is True
    kernels = row["kernels"]
    assert [kernel["ms"] for kernel in kernels] == sorted((kernel["ms"] for kernel in kernels), reverse=True)
    assert sum(kernel["ms"] for kernel in kernels) == pytest.approx(row["kernels_per_step"]["ms"])
    (calls,) = (each["calls"] for each in kernels if each["name"] == "aten::convolution_backward")
    assert calls == 19 + 2  # of the layers and in shortcuts


def test_candidate_and_unchanged_step_are_measured_alternately(measure, monkeypatch):
    """The change is made to the candidate's step only; the ratio is taken round by round."""
    changed = []

    def refuse(step):
        raise RuntimeError("no such thing here")

    monkeypatch.setattr(
        gpu_cases,
        "CANDIDATES",
        (
            Candidate(name="refused", case=SMALL, change=refuse),
            Candidate(name="changed", case=SMALL, compiled=False, change=changed.append),
        ),
    )
    turns = iter([5.0, 5.0, 10.0, 20.0, 10.0, 30.0])  # untimed off and on, then two rounds
    original = gpu_cases.TimedRecipe.measure

    def fixed(self, seconds):
        original(self, 0)
        return next(turns) if seconds else 0.0

    monkeypatch.setattr(gpu_cases.TimedRecipe, "measure", fixed)
    code, report = measure("candidates")
    assert code == 1
    assert report["failed"] == {"refused: fast/resnet20/b2": "RuntimeError: no such thing here"}
    off, on = report["rows"]
    assert (off["name"], on["name"]) == ("changed: fast/resnet20/b2, off", "changed: fast/resnet20/b2, on")
    assert (off["images_per_s"], on["images_per_s_low"], on["images_per_s_high"]) == (10, 20, 30)
    (ratio,) = report["ratios"]
    assert (ratio["low"], ratio["median"], ratio["high"]) == (2, 2.5, 3)
    assert len(changed) == 1


@pytest.mark.gpu
def test_captured_step_reports_kernels_and_memory(measure):
    code, report = measure("steps")
    (row,) = report["rows"]
    assert code == 0
    assert row["gpu_memory_mb"] > 0
    assert row["kernels_per_step"]["calls"] > 62  # its convolutions: forward, of images and of weights
    assert not any(kernel["name"].startswith("aten::") for kernel in row["kernels"])


@pytest.mark.gpu
def test_inductor_candidate_launches_fewer_kernels(measure, monkeypatch):
    combined = Candidate(name="combined", case=SMALL, inductor=gpu_cases.COMBINED)
    calls = []
    monkeypatch.setattr(gpu_cases, "CANDIDATES", (combined,))
    monkeypatch.setattr(gpu_cases, "_compare", lambda *given: calls.extend(given[2:4]))
    assert measure("candidates")[0] == 0
    off, on = (steps.kernels(2)["kernels_per_step"]["calls"] for steps in calls)
    assert on < off
