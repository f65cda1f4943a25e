"""An interrupted verify goes on where it stopped, unless what it had found may no longer hold."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from loramem_cli.main import run

from loramem import MemoryStore
from loramem.results import VerifyReport
from loramem.store import verify_progress

from .conftest import numbers
from .test_integrity import execute, flip_bit, reseal

EACH, ADAPTERS = 2, 3


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume") / "memory"
    with MemoryStore(path, str(base)) as store:
        for shard in range(ADAPTERS):
            store.write({f"{key} of {shard}": value for key, value in numbers(EACH).items()}, rank=1)
    return path


@pytest.fixture
def path(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "memory")
    return tmp_path / "memory"


class Interrupted(BaseException):
    """As Ctrl-C."""


def interrupt(store: Path, after: int = EACH * 2, **how: bool) -> None:
    """A verify that ends in the middle."""

    def stop(done: int, _: int) -> None:
        if done > after:
            raise Interrupted

    with MemoryStore(store, create=False) as opened, pytest.raises(Interrupted):
        opened.verify(progress=stop, **how)


def resumed(store: Path, *arguments: str) -> VerifyReport:
    with MemoryStore(store, *arguments, create=False) as opened:
        return opened.verify(resume=True)


def adapter_of(store: Path, place: int) -> Path:
    """In the order they are verified in."""
    return sorted((store / "adapters").iterdir())[place]


def test_adapters_that_were_finished_are_not_decoded_again(path: Path, monkeypatch) -> None:
    interrupt(path)
    decoded, told = list[str](), list[tuple[int, int]]()
    with MemoryStore(path, create=False) as store:
        reader, decode = store._session.reader, store._session.reader.try_decode
        monkeypatch.setattr(reader, "try_decode", lambda batch: decoded.append(batch[0].adapter) or decode(batch))
        report = store.verify(resume=True, progress=lambda *counts: told.append(counts))
    assert decoded == [adapter_of(path, 2).name]
    assert (report.ok, report.records, report.exact, report.resumed) == (True, 6, 6, 4)
    assert told == [(2, 6), (4, 6), (6, 6)]
    assert resumed(path).resumed == 0  # it was finished


def test_an_interrupted_verify_that_was_resumed_goes_on_from_there(path: Path) -> None:
    interrupt(path, after=EACH)
    interrupt(path, after=EACH * 2, resume=True)
    assert resumed(path).resumed == EACH * 2


def test_verify_begins_again_unless_told_to_resume(path: Path) -> None:
    interrupt(path)
    interrupt(path, after=0)
    assert resumed(path).resumed == 0


def changed_row(path: Path) -> None:
    with MemoryStore(path, create=False) as store:
        store.update("key 0 of 0", metadata={"n": 1})


def changed_row_outside(path: Path) -> None:
    execute(path, "update records set min_prob = 0.7 where key = 'key 0 of 0'")
    reseal(path)


@pytest.mark.parametrize("change", [changed_row, changed_row_outside])
def test_a_change_of_the_store_makes_it_begin_again(path: Path, change: Callable[[Path], None]) -> None:
    interrupt(path)
    change(path)
    report = resumed(path)
    assert (report.exact, report.resumed) == (6, 0)


def test_other_libraries_or_another_dtype_make_it_begin_again(path: Path, monkeypatch) -> None:
    interrupt(path)
    with MemoryStore(path, dtype="bfloat16", create=False) as store:
        interrupted = verify_progress.VerifyProgress(path, "")
        kept = interrupted.path.read_text()
        assert store.verify(resume=True).resumed == 0
    interrupted.path.write_text(kept)
    with monkeypatch.context() as patched:
        patched.setattr(verify_progress, "version", lambda name: "9.9")
        assert resumed(path).resumed == 0
    interrupted.path.write_text(kept)
    assert resumed(path).resumed == 4


def test_damage_that_came_after_a_file_was_verified_is_found(path: Path) -> None:
    interrupt(path)
    weights = adapter_of(path, 0) / "adapter_model.safetensors"
    flip_bit(weights, 8 * weights.stat().st_size - 8)
    execute(path, f"update records set min_prob = 0.99 where adapter = '{adapter_of(path, 1).name}'")
    report = resumed(path)
    assert report.exact == 2
    assert len(report.failed) == 4
    assert any(adapter_of(path, 0).name in problem for problem in report.damaged)


def test_an_adapter_that_did_not_come_out_whole_is_decoded_again(path: Path) -> None:
    execute(path, f"update records set answer_tokens = 9 where adapter = '{adapter_of(path, 0).name}'")
    execute(path, f"update records set salt = 'x' where adapter = '{adapter_of(path, 1).name}'")
    reseal(path)
    interrupt(path)
    report = resumed(path)
    assert (report.resumed, report.exact, len(report.damaged)) == (0, 4, 2)


def test_a_line_that_was_cut_off_is_not_believed_and_no_key_is_kept(path: Path) -> None:
    interrupt(path)
    kept = verify_progress.VerifyProgress(path, "").path
    assert "key" not in kept.read_text()
    kept.write_bytes(kept.read_bytes()[:-1])
    assert resumed(path).resumed == 2
    interrupt(path)
    kept.write_bytes(b"\xff\n")
    assert resumed(path).resumed == 0


def test_a_cache_that_cannot_be_written_only_costs_the_progress(path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    interrupt(path)
    report = resumed(path)
    assert (report.ok, report.resumed) == (True, 0)


def test_the_command_resumes(path: Path, capsys) -> None:
    interrupt(path)
    assert run(["verify", "--resume", "--store", str(path)]) == 0
    shown = capsys.readouterr()
    assert "resumed  4 of these" in shown.out
    assert shown.err == ""  # no bar where nobody watches
    assert run(["verify", "--json", "--store", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["resumed"] == 0
    assert run(["verify", "--resume", "--quick", "--store", str(path)]) == 2
    assert "--quick" in capsys.readouterr().err


def test_quick_and_resume_are_not_both(path: Path) -> None:
    with MemoryStore(path, create=False) as store, pytest.raises(ValueError, match="not both"):
        store.verify(quick=True, resume=True)
