"""`loramem suite run`: a user's mistake is one line and an exit code, and no option is left out in silence."""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from loramem_cli.main import run

from loramem.suites import runner

ALWAYS = {"device", "threads", "workers"}
VALUES = {
    "records": ["--records", "4"], "lengths": ["--lengths", "4"], "ranks": ["--ranks", "1"],
    "methods": ["--methods", "sft"], "model": ["--model", "nowhere"], "paper": ["--paper"],
    "data": ["--data", __file__], "unit": ["--unit", "branch"], "layer": ["--layer", "0"],
    "store": ["--store", "nowhere"], "every_record": ["--all"], "dtype": ["--dtype", "bfloat16"],
}  # fmt: skip


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    @contextmanager
    def processes(_: runner.SuiteOptions) -> Iterator[object]:
        yield runner.measure

    monkeypatch.setattr(runner, "_processes", processes)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("phonebook --lengths 40 --methods sft --layer 99", 1, "The layers are 0 to 2, not 99."),
        ("long-context --lengths 20 --methods memft-ot --layer 99", 1, "The layers are 0 to 2, not 99."),
        ("linear-rule --records 4 --layer 99", 1, "The layers are 0 to 2, not 99."),
        ("linear-rule --records 20000", 1, "There are 10,000 pairs: not 20,000"),
        ("phase --lengths 99999999", 1, "99,999,999 are too many."),
        ("phase --lengths 1024", 5, "tokens"),
        ("law --lengths 40 --layer 99", 1, "--layer"),
        ("law --unit branch", 1, "--unit down_proj"),
        ("long-context --lengths 1024 --methods sft", 5, "tokens"),
    ],
)
def test_a_wrong_option_is_one_line_and_an_exit_code(
    arguments: str, code: int, message: str, in_this_process: None, base: Path, tmp_path: Path, capsys
) -> None:
    common = ["--quick", "--threads", "1", "--model", str(base), "--out", str(tmp_path / "results.jsonl")]
    assert run(["suite", "run", *arguments.split(), *common]) == code
    out, err = capsys.readouterr()
    (line,) = (line for line in err.splitlines() if not line.endswith("…"))
    assert line.startswith("Error: ")
    assert message in line
    assert out == ""


@pytest.mark.parametrize("name", runner.SUITES)
def test_an_option_that_does_not_concern_a_suite_is_refused(name: str, capsys) -> None:
    idle = set(VALUES).difference(runner.load_suite(name).OPTIONS)
    assert idle
    for option in idle:
        assert run(["suite", "run", name, *VALUES[option]]) == 2
        assert f"{VALUES[option][0]} does not concern {name}." in capsys.readouterr().err


@pytest.mark.parametrize("name", runner.SUITES)
def test_the_options_of_a_suite_are_those_that_it_reads(name: str) -> None:
    source = inspect.getsource(runner.load_suite(name))
    read = set(re.findall(r"\brequest\.(\w+)", source)) | ({"unit", "layer"} if "unit_of(request" in source else set())
    assert read | ALWAYS == {*runner.COMMON, *runner.load_suite(name).OPTIONS}
    assert set(VALUES) | set(runner.COMMON) == {field.name for field in fields(runner.SuiteOptions)}


def test_an_option_of_the_environment_is_not_one_of_the_command(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setenv("LORAMEM_MODEL", "loramem-tiny")
    arguments = ["large-base", "--no-run", "--quick", "--out", str(tmp_path / "none.jsonl")]
    assert run(["suite", "run", *arguments]) == 2
    assert "holds nothing of this suite" in capsys.readouterr().err
