"""No copy of a store lands in a store's folder, where erasing would not reach it; what is refused leaves nothing."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from loramem_cli.main import run

from loramem import MemoryStore
from loramem._util.files import OF_A_STORE, beside, outside_stores
from loramem.errors import StoreError
from loramem.index.index import NAME as INDEX
from loramem.store.manifest import NAME as MANIFEST
from loramem.suites import reporter
from loramem.suites.report import build

from .conftest import ROOT, numbers

COPIES: dict[str, Callable[[MemoryStore, Path], object]] = {
    "backup": lambda store, target: store.backup(target),
    "export": lambda store, target: store.export(target),
    "export to a file": lambda store, target: store.export(target.with_suffix(".tar")),
    "deploy": lambda store, target: store.deploy("peft", target),
    "import": lambda store, target: MemoryStore.import_bundle(store.path.parent / "bundle", target),
    "pull": lambda store, target: MemoryStore.pull("me/facts", target),
    "a new store": lambda store, target: MemoryStore(target, str(store.base.folder)),
    "report": lambda store, target: reporter.write(build([], 0), target),
}


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("outside") / "memory"
    with MemoryStore(path, str(base)) as store:
        store.write(numbers(1))
        store.export(path.parent / "bundle")
    return path


@pytest.fixture
def store(written: Path, tmp_path: Path) -> Iterator[MemoryStore]:
    shutil.copytree(written.parent, tmp_path / "home")
    with MemoryStore(tmp_path / "home/memory", create=False) as store:
        list(store.recall_many())
        yield store


def entries(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_a_copy_into_a_store_is_refused_by_whatever_path(
    store: MemoryStore, copy: Callable[[MemoryStore, Path], object], tmp_path: Path
) -> None:
    inside, other = tmp_path / "link", tmp_path / "other"
    inside.symlink_to(store.path / "staging")
    for name in ("dangling", "dangling.tar"):
        (tmp_path / name).symlink_to(store.path / "copy")
    shutil.copytree(store.path, other)
    before = entries(tmp_path)
    for target in (
        store.path / "copy",
        store.path / "adapters/deep/er/copy",
        inside / "copy",
        tmp_path / "dangling",
        tmp_path / "nowhere/../home/memory/copy",
        other / "copy",
    ):
        with pytest.raises(StoreError, match="Give a path outside it"):
            copy(store, target)
        assert entries(tmp_path) == before


def test_a_folder_that_holds_a_store_is_no_store(store: MemoryStore, tmp_path: Path) -> None:
    assert sorted(OF_A_STORE) == sorted([MANIFEST, INDEX])
    store.backup(store.path.parent / "copy")
    (tmp_path / "store.json").write_text("{}")  # as other programs name theirs
    store.backup(tmp_path / "copy")
    assert outside_stores(tmp_path / "report") == tmp_path / "report"
    with pytest.raises(StoreError, match="Give a path outside it"):
        reporter.write(build([], 0), store.path)


def test_the_store_itself_is_not_taken_for_what_a_killed_copy_left(store: MemoryStore, tmp_path: Path) -> None:
    shutil.copytree(store.path, tmp_path / "copy.partial/store")
    with MemoryStore(tmp_path / "copy.partial/store", create=False) as odd:
        with pytest.raises(StoreError, match="would be overwritten"):
            odd.backup(tmp_path / "copy")
        assert odd.recall("key 0") == numbers(1)["key 0"]
    store.path.rename(tmp_path / "home/name.partial")
    with pytest.raises(StoreError, match="would be overwritten"), beside(tmp_path / "home/name"):
        pass
    assert (tmp_path / "home/name.partial/store.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        "backup {store}/copy --store {store}",
        "export {store}/copy.tar --store {store}",
        "law --plot {store}/law.png",
        "capacity --length 10 --plot {store}/plan.png",
        "calibrate --save {store}/known.json",
        "calibrate --runs {store}/runs.jsonl",
        "suite report {results} --out {store}/report",
        "suite run write-speed --out {store}/results.jsonl",
    ],
)
def test_the_command_line_says_so_in_one_line(arguments: str, store: MemoryStore, capsys) -> None:
    before = entries(store.path)
    assert run(arguments.format(store=store.path, results=ROOT / "docs/results").split()) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "Give a path outside it." in err
    assert entries(store.path) == before
