"""A verify whose decoding is somebody else's finds what it finds here, and leaves nothing there."""

import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loramem_cli.main import run

from loramem import MemoryStore
from loramem.errors import OtherRelease
from loramem.results import VerifyReport
from loramem.store import verify as module
from loramem.workers import worker

from .test_integrity import execute, flip_bit, reseal
from .test_verify_resume import ADAPTERS, EACH, Interrupted, adapter_of, path, written  # noqa: F401


class Worker(ThreadPoolExecutor):
    """One thread; counts what it is given."""

    def __init__(self) -> None:
        super().__init__(1)
        self.given = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        assert fn is worker.run_decoding
        self.given += 1
        return super().submit(fn, *args, **kwargs)


def both(path: Path) -> tuple[VerifyReport, VerifyReport, int]:  # noqa: F811
    """What is found here and there, and the jobs that it took."""
    with MemoryStore(path, create=False) as store, Worker() as there:
        found = store.verify(), store.verify(executor=there)
        return *(replace(report, elapsed_s=0.0) for report in found), there.given


def test_a_whole_store_takes_a_job_for_each_adapter(
    path: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (scratch := tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    here, there, jobs = both(path)
    assert here == there and there.ok and there.exact == EACH * ADAPTERS
    assert jobs == ADAPTERS
    assert list(scratch.iterdir()) == []
    monkeypatch.setattr(module, "TOGETHER", 2)
    assert both(path) == (here, there, jobs)


def test_the_same_damage_is_found(path: Path) -> None:  # noqa: F811
    flip_bit(adapter_of(path, 0) / "adapter_model.safetensors", 5_000)
    (adapter_of(path, 1) / "adapter_config.json").unlink()
    whole = f"select max(rowid) from records where adapter = '{adapter_of(path, 2).name}'"
    execute(path, f"update records set digest = 'x' where rowid = ({whole})")
    reseal(path)
    here, there, jobs = both(path)
    assert here == there and not there.ok
    assert (there.exact, jobs) == (EACH - 1, 1)


def test_an_interrupted_verify_goes_on_there_but_not_here(path: Path) -> None:  # noqa: F811
    def stop(done: int, _: int) -> None:
        if done > EACH:
            raise Interrupted

    with MemoryStore(path, create=False) as store, Worker() as there:
        with pytest.raises(Interrupted):
            store.verify(progress=stop, executor=there)
        there.given = 0
        assert store.verify(resume=True, executor=there).resumed == EACH
        assert there.given == ADAPTERS - 1
        with pytest.raises(Interrupted):
            store.verify(progress=stop, executor=there)
        assert store.verify(resume=True).resumed == 0  # another device may have decoded


def test_workers_of_another_release_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(worker, "releases", lambda: {"torch": "1.0.0"})
    with MemoryStore(path, create=False) as store, Worker() as there, pytest.raises(OtherRelease):
        store.verify(executor=there)


def test_a_quick_check_has_nothing_for_workers(path: Path) -> None:  # noqa: F811
    assert run(["verify", "--quick", "--workers", "2", "--store", str(path)]) == 2
