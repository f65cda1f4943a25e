"""loramem serve as a process: it says where it answers, answers, and ends when it is interrupted."""

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from loramem_cli.main import run

from loramem import MemoryStore

from .conftest import ROOT


@pytest.fixture(scope="module")
def place(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "memory"
    with MemoryStore(folder, str(base)) as store:
        store.write({"door:": "0417#"})
    return folder


def test_it_serves_with_a_token_until_it_is_interrupted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMEM_TOKEN", "secret token")
    command = [sys.executable, "-m", "loramem_cli", "-v", "serve", "--store", str(place), "--port", "0", "--json"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # What runs in the background hands on to its children that interrupts are ignored.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=ROOT, preexec_fn=heard, **pipes) as process:
        try:
            url = json.loads(process.stdout.readline())["url"]
            asked = {"model": "loramem", "messages": [{"role": "user", "content": "door:"}]}
            with httpx2.Client(timeout=30) as client:
                assert client.post(url + "/chat/completions", json=asked).status_code == 401
                client.headers["authorization"] = "Bearer secret token"
                answer = client.post(url + "/chat/completions", json=asked).json()
            assert answer["choices"][0]["message"]["content"] == "0417#"
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert url in told and not any(text in told for text in ("door:", "0417#", "secret token"))


def test_a_port_that_is_taken_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run(["serve", "--store", str(place), "--port", str(taken.getsockname()[1])]) == 1
    assert "Error:" in capsys.readouterr().err


def test_no_store_is_its_exit_code_before_a_model_is_loaded(tmp_path: Path) -> None:
    for command in ("serve", "mcp"):
        assert run([command, "--store", str(tmp_path / "none"), *(["--read-only"] if command == "mcp" else [])]) == 10


@pytest.mark.parametrize(("command", "library"), [("serve", "starlette"), ("mcp", "mcp")])
def test_a_library_that_is_not_installed_is_named(
    command: str, library: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == library or "loramem.endpoint." in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    assert run([command, "--store", str(place)]) == 1
    assert f"pip install 'loramem[{command}]'" in capsys.readouterr().err


def test_a_dtype_is_of_the_model_in_this_process(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["serve", "--store", str(place), "--upstream", "http://127.0.0.1:1", "--dtype", "bfloat16"]
    assert run(asked) == 2
    assert "none with --upstream" in capsys.readouterr().err
