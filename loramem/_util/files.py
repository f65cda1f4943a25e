"""Durable files: written beside, synced, renamed."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from loramem.errors import StoreError

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
OF_A_STORE = ("store.json", "index.db")
"""What every store has, by the names of `loramem.store.manifest` and `loramem.index.index`, which build on this
module."""


def write_synced(path: Path, content: bytes, mode: int = PRIVATE_FILE) -> None:
    """Replace a file so that after a crash it holds the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    _write(partial, content, mode)
    partial.replace(path)
    sync_directory(path.parent)


def write_directory(path: Path, files: dict[str, bytes]) -> None:
    """Create a private directory of files, which are on disk once `sync_tree` was there."""
    make_directory(path, sync=False)
    for name, content in files.items():
        _write(path / name, content, sync=False)


def make_directory(path: Path, *, sync: bool = True) -> None:
    """Create a private directory, and whatever of its parents is missing, durably unless told otherwise."""
    if not path.exists():
        make_directory(path.parent, sync=sync)
        path.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)
        if sync:
            sync_directory(path.parent)


def rename_directories(targets: Mapping[Path, Path]) -> None:
    """Rename directories of synced files durably, each to its target.

    A target of the same content is left alone; another one was damaged, and goes where the source came from.
    """
    for source, target in targets.items():
        if target.exists():
            if _contents(source) == _contents(target):
                continue
            target.rename(source.with_name(source.name + ".damaged"))
        source.rename(target)
    for parent in dict.fromkeys(target.parent for target in targets.values()):
        sync_directory(parent)  # also of what has its name already: whoever gave it may have been killed before this


def outside_stores(target: Path, *, new: bool = False) -> Path:
    """The path as it is, where no store's folder holds it, by whatever links it is named.

    `erase` clears a store's own files: a copy among them would keep what it erases. And a folder that a store takes for
    its own, such as ``staging``, is removed with all that lies in it.

    Args:
        new: The target may become a store itself meanwhile.

    Raises:
        StoreError: A store's folder does, or it is one.
    """
    itself = Path(os.path.realpath(target))
    parent = Path(os.path.realpath(target.parent))
    for folder in (*([] if new else [itself]), *itself.parents, parent, *parent.parents):
        if is_store(folder):
            raise StoreError(
                f"{target} lies in the folder of the store {folder}, which would not erase there what it erases. "
                "Give a path outside it."
            )
    return target


def is_store(folder: Path) -> bool:
    """Whether a folder looks like a store, whatever is in its files."""
    return all(os.path.isfile(folder / name) for name in OF_A_STORE)  # noqa: PTH113 - False where Path raises


@contextmanager
def beside(target: Path, source: Path | None = None) -> Iterator[Path]:
    """A folder beside the target for all that it takes to make it; what a crash left there is removed first.

    Args:
        source: What the target is made of, which is never taken for what a crash left.

    Raises:
        StoreError: There is something at ``target``, it lies in a store, or the folder beside it is in use.
    """
    if target.exists():
        raise StoreError(f"{target} exists already. Give another path.")
    outside_stores(target)
    partial = target.with_name(target.name + ".partial")
    real = Path(os.path.realpath(partial))
    if is_store(partial) or (source is not None and Path(os.path.realpath(source)).is_relative_to(real)):
        raise StoreError(f"{partial} would be overwritten to make {target}. Give another path, or move what is there.")
    if partial.is_dir():
        remove_directory(partial)
    partial.unlink(missing_ok=True)  # a file of that name would block every later call
    make_directory(partial)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def rename_new(made: Path, target: Path) -> int:
    """Rename what was made to the target, durably; returns its bytes."""
    sync_tree(made)
    made.rename(target)
    sync_directory(target.parent)
    return target.stat().st_size if target.is_file() else size_bytes(target)


def remove_directory(path: Path) -> None:
    """Remove a directory and all in it, durably; one that is gone already is none to remove."""
    if path.exists():
        shutil.rmtree(path)
        sync_directory(path.parent)


def copy_synced(source: Path, target: Path) -> None:
    """Copy a file durably, readable by its owner alone."""
    _write(target, source.read_bytes())


def size_bytes(folder: Path) -> int:
    """Of all files in a folder; one that goes in the meantime counts nothing."""
    total = 0
    for parent, _, names in os.walk(folder):  # which passes over a folder that goes, as rglob does not
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(parent, name).stat().st_size
    return total


def sync_tree(path: Path) -> None:
    """Flush a file, or a directory with all that is in it, the innermost first."""
    for below in sorted(path.rglob("*"), reverse=True):
        sync_directory(below)
    sync_directory(path)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, content: bytes, mode: int = PRIVATE_FILE, *, sync: bool = True) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        if sync:
            file.flush()
            os.fsync(file.fileno())


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
