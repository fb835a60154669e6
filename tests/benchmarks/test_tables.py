"""Tables in the documents match the committed results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tables import RESULTS, main, with_tables

PROJECT = Path(__file__).parents[2]
DOCUMENTS = [PROJECT / "README.md", PROJECT / "benchmarks" / "README.md", *sorted(PROJECT.glob("docs/*.md"))]
WITH_TABLES = [path for path in DOCUMENTS if "<!-- end -->" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", WITH_TABLES, ids=lambda path: path.name)
def test_every_table_is_up_to_date(path):
    text = path.read_text(encoding="utf-8")
    assert with_tables(text) == text, f"run: python -m benchmarks.tables {path}"


def test_the_documents_that_quote_measurements_have_tables():
    names = {path.relative_to(PROJECT).as_posix() for path in WITH_TABLES}
    pages = ("models", "reproduction", "reliability", "scaling", "speedrun")
    assert names == {"README.md", "benchmarks/README.md", *(f"docs/{page}.md" for page in pages)}


def test_a_table_is_replaced_and_nothing_else():
    text = "before\n<!-- results: loaders-2-cores.json -->\nold\n<!-- end -->\nafter\n"
    made = with_tables(text)
    assert made.startswith("before\n<!-- results: loaders-2-cores.json -->\n")
    assert made.endswith("<!-- end -->\nafter\n")
    assert "old" not in made
    assert with_tables(made) == made


@pytest.mark.usefixtures("quick_processes")
@pytest.mark.parametrize(
    ("argument", "code", "out", "err"),
    [
        ("--help", 0, "usage: python -m benchmarks.tables FILE...", ""),
        ("no-such-file.md", 2, "", "fastresnet: cannot read no-such-file.md: No such file or directory.\n"),
    ],
)
def test_command_prints_help_and_refuses_an_unreadable_file(argument, code, out, err):
    command = [sys.executable, "-m", "benchmarks.tables", argument]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.partition("\n")[0], done.stderr) == (code, out, err)


def test_the_command_line_writes_the_tables(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("é\n<!-- results: loaders-2-cores.json -->\nold\n<!-- end -->\n", encoding="utf-8")
    assert main([str(path)]) == 0
    assert "old" not in path.read_text(encoding="utf-8")
    assert path.read_text(encoding="utf-8") == with_tables(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_every_committed_result_has_provenance(path):
    report = json.loads(path.read_bytes())
    environment = report["environment"]
    assert report["schema"] == 1
    assert all(environment[key] for key in ("device", "threads", "versions", "commit", "command", "started"))
    assert not environment["commit"].endswith("+")  # measured from a committed state
    for row in report["rows"] if report["benchmark"] != "kernels" else ():
        assert row["images_per_s_low"] <= row["images_per_s"] <= row["images_per_s_high"]
