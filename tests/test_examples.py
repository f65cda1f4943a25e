"""The examples run as they stand."""

import doctest
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import loramem.api.store
from loramem import MemoryStore, base_path

from .conftest import ROOT
from .hub_server import HubServer


def run(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


Here = Callable[..., str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Runs a script in this process, which has torch and PEFT imported, and returns what it printed."""

    def shown(script: Path, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script.name, *arguments])
        capsys.readouterr()
        runpy.run_path(str(script))
        return capsys.readouterr().out

    return shown


def test_quickstart_then_recall_from_another_process(here: Here, tmp_path: Path) -> None:
    shown = here(ROOT / "examples" / "01_quickstart.py", "memory")
    assert "9100672710" in shown
    assert "Close keys: 'Ada Lindqvist:'" in shown
    records = tmp_path / "records.csv"
    records.write_text("key,value\nAda Lindqvist:,9100672710\ndeploy token,ghx_7Qd2-94af\n")
    shown = run(str(ROOT / "examples" / "02_check_recall.py"), str(records), "memory", cwd=tmp_path)
    assert shown == "2 of 2 records exact\n"


def test_sharing_over_the_hub(hub: HubServer, here: Here, tmp_path: Path) -> None:
    shown = here(ROOT / "examples" / "05_share.py", "me/facts", str(tmp_path))
    assert shown == "2 records, 1 adapter uploaded\nAsked for its key: 9100672710\nA key in the store as text: False\n"


def test_peft_alone_recalls_what_was_deployed_one_by_one_and_in_a_mixed_batch(here: Here, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "memory") as store:
        (adapter,) = store.write({"Ada Lindqvist:": "9100672710", "deploy token": "ghx_7Qd2-94af"}).adapters
        store.write({"Marco Nakamura:": "9855226842"})
        store.deploy("peft", tmp_path / "deployed", include_keys=True)

    def shown(name: str, *arguments: str) -> str:
        return here(ROOT / "examples" / name, str(base_path()), str(tmp_path / "deployed"), *arguments)

    assert shown("03_peft_only.py", adapter, "deploy token", "Ada Lindqvist:") == "ghx_7Qd2-94af\n9100672710\n"
    assert sorted(shown("04_mixed_batch.py").splitlines()) == [
        "Ada Lindqvist:\t9100672710",
        "Marco Nakamura:\t9855226842",
        "deploy token\tghx_7Qd2-94af",
    ]


def test_the_phone_book_is_what_its_script_writes(tmp_path: Path) -> None:
    shown = run("-m", "loramem.planning.samples", "phonebook", "100", cwd=tmp_path)
    assert shown == (ROOT / "examples" / "phonebook.jsonl").read_text()


def test_docstring_examples_run() -> None:
    assert doctest.testmod(loramem.api.store).failed == 0
