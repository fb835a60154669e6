"""The live page of runs, asked as a browser does, and in one."""

import http.client
import os
import re
import shutil
import signal
import subprocess
import threading

import pytest

from fastresnet import live
from fastresnet.config import TrainConfig
from pipelines.errors import DataError, UsageError

HEADER = "epoch,step,lr,train_loss,train_accuracy,test_loss,test_accuracy,overflows\n"


def write_epochs(folder, number):
    (folder / "metrics.csv").write_text(
        HEADER + "".join(f"{n},{10 * n},0.1,2,10,2,{n},0\n" for n in range(1, number + 1))
    )


@pytest.fixture
def begun(tmp_path):
    """A run of 7 epochs that has begun, and has not finished an epoch."""
    folder = tmp_path / "a<b>"
    folder.mkdir()
    (folder / "config.toml").write_text(TrainConfig(recipe="smoke", data="shapes10", epochs=7).to_toml())
    return folder


@pytest.fixture
def server(begun):
    with live.LiveServer([begun], 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, method="GET", path="/", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer, answer.read().decode()


def test_page_waits_for_the_first_epoch_and_follows_the_run(server, begun):
    answer, text = ask(server)
    assert answer.status == 200
    assert "the first epoch is not finished" in text
    assert "a&lt;b&gt;" in text
    assert "location.reload" in text
    before = answer.headers["ETag"]
    assert before.replace('"', "") in text
    assert ask(server, If_None_Match=before)[0].status == 304
    write_epochs(begun, 2)
    answer, text = ask(server, If_None_Match=before)
    assert (answer.status, answer.headers["ETag"] == before) == (200, False)
    assert "Not finished: 2 of 7 epochs." in text
    assert "2.00 %" in text
    write_epochs(begun, 3)
    assert "Not finished: 3 of 7 epochs." in ask(server)[1]


def test_page_is_made_once_for_each_state_of_the_files(server, begun, monkeypatch):
    write_epochs(begun, 1)
    made = []
    monkeypatch.setattr(live, "page", lambda runs, **_: made.append(runs) or "<html></body>")
    for _ in range(3):
        ask(server)
    assert len(made) == 1


def test_damaged_files_are_named_until_they_are_mended(server, begun):
    (begun / "metrics.csv").write_text("nothing")
    answer, text = ask(server)
    assert answer.status == 200
    assert "metrics.csv is damaged" in text
    write_epochs(begun, 1)
    assert "1 of 7 epochs" in ask(server)[1]


@pytest.mark.parametrize(
    ("method", "path", "host", "status"),
    [
        ("GET", "/", "localhost:1", 200),
        ("GET", "/", "127.0.0.1", 200),
        ("GET", "/", "example.com", 403),
        ("GET", "/", "127.0.0.1.example.com:80", 403),
        ("GET", "/", "", 403),
        ("GET", "/../config.toml", "localhost", 404),
        ("GET", "/metrics.csv", "localhost", 404),
        ("POST", "/", "localhost", 501),
        ("PUT", "/", "localhost", 501),
    ],
)
def test_only_the_page_is_served_and_only_to_this_machine(server, method, path, host, status):
    assert ask(server, method, path, Host=host)[0].status == status
    assert server.server_address[0] == "127.0.0.1"


def test_a_silent_connection_keeps_no_other_waiting(server):
    silent = http.client.HTTPConnection("127.0.0.1", server.server_port)
    silent.connect()
    assert ask(server)[0].status == 200
    silent.close()


def test_port_in_use_and_folder_without_a_run_are_refused(server, begun, tmp_path, run):
    with pytest.raises(UsageError, match=r"--serve \d+: this port cannot be used \(Address already in use\)"):
        live.LiveServer([begun], server.server_port)
    with pytest.raises(DataError, match=r"has no config\.toml: it is not a run folder, or its training has not begun"):
        live.LiveServer([begun, tmp_path], 0)
    for arguments, message in (
        (["--serve", "70000"], "--serve 70000 is not a port, 0..65535"),
        (["--serve", "0", "--out", tmp_path / "x.html"], "--serve cannot be combined with --out"),
    ):
        code, _, err = run("report", begun, *arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err


def test_browser_loads_the_page_again_when_the_run_goes_on(server, begun, monkeypatch):
    chromium = shutil.which("chromium") or pytest.skip("there is no chromium")
    write_epochs(begun, 1)
    asked, answer = [], live._Handler._answer

    def count(handler, tag, contents):
        asked.append(tag)
        if len(asked) == 2:  # the page has asked again
            write_epochs(begun, 2)
        answer(handler, tag, contents)

    monkeypatch.setattr(live._Handler, "_answer", count)
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=9000", "--dump-dom"]
    done = subprocess.run([*command, server.url], capture_output=True, text=True, timeout=120, check=True)
    assert "Not finished: 2 of 7 epochs." in done.stdout


def test_ctrl_c_ends_the_server(python, begun):
    command = [python, "-m", "fastresnet", "report", str(begun), "--serve", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/ \(Ctrl-C ends it\)\n", process.stdout.readline())
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "fastresnet: interrupted.\n")
