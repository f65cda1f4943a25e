"""A store copied as one committed state: backups, and exports that another machine can import.

A backup is a store as it is. An export leaves behind what is about this machine or not committed (the base model's
folder, the journal), and lists every file with its sha256, as a directory or a single tar file.
"""

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from loramem._util.files import beside, copy_synced, make_directory, remove_directory, rename_new, write_synced
from loramem._util.layout import ADAPTERS
from loramem.errors import BundleError, IntegrityError
from loramem.index.commits import commit_export, commit_gc
from loramem.index.connection import sqlite_errors
from loramem.index.index import NAME as INDEX
from loramem.index.index import Index
from loramem.store.integrity import problems
from loramem.store.manifest import NAME as MANIFEST
from loramem.store.manifest import read_manifest

FORMAT, NAME = 1, "bundle.json"
_MEMBER = re.compile(
    r"store\.json|index\.db|adapters/[0-9a-f]{32}/(adapter_model\.safetensors|adapter_config\.json|README\.md)"
)


def backup(store: Path, index: Index, target: Path) -> int:
    """Copy a store, which may be written to meanwhile, as it was committed at one moment; returns the bytes.

    Raises:
        StoreError: There is something at ``target``, or it lies in a store's folder.
        IntegrityError: A file is not what was committed: damage is not copied.
    """
    with beside(target, store) as partial:
        folder = partial / "store"
        _copy(store, index, folder)
        copy_synced(store / MANIFEST, folder / MANIFEST)
        return rename_new(folder, target)


def export(store: Path, index: Index, target: Path) -> int:
    """Write a store to a directory, or to one file if ``target`` ends in .tar; returns the bytes.

    Raises what `backup` raises.
    """
    with beside(target, store) as partial:
        folder = partial / "store"
        _copy(store, index, folder)
        _leave_behind(store, folder)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        listed = {name: _sha256(folder / name) for name in names}
        write_synced(folder / NAME, (json.dumps({"format": FORMAT, "files": listed}, indent=2) + "\n").encode())
        if target.suffix != ".tar":
            return rename_new(folder, target)
        _pack(folder, [NAME, *names], partial / "packed")
        return rename_new(partial / "packed", target)


def import_bundle(source: Path, target: Path) -> None:
    """Make a store of an export, after checking every file, row and seal.

    Files that the bundle's manifest does not list, or that no store has, are not read. The values are not decoded:
    `verify` does, with the base model at hand.

    Raises:
        BundleError: Not an export, a damaged one, or one of a newer format.
        StoreError: There is something at ``target``, or it lies in a store's folder.
    """
    with beside(target, source) as partial:
        folder = partial / "store"
        with _read(source) as content:
            listed = _listed(content(NAME), source)
            for name, sha256 in listed.items():
                data = content(name)
                if data is None or hashlib.sha256(data).hexdigest() != sha256:
                    raise BundleError(f"{source}: {name} is not what was exported. Export again.")
                make_directory((folder / name).parent)
                write_synced(folder / name, data)
        index = Index.open(folder / INDEX)
        found = list(problems(folder, index))
        index.close()
        if found:
            raise BundleError(f"{source} holds a damaged store: {found[0]}.")
        rename_new(folder, target)


def _copy(store: Path, index: Index, folder: Path) -> None:
    """Index and adapters of one committed state; from the beginning again if `gc` was faster than the copy.

    What an adapter that is gone by then held may have been erased: nothing of the first pass is kept.
    """
    for last in (False, True):
        remove_directory(folder)
        make_directory(folder)
        with sqlite_errors(folder / INDEX):
            index.copy_to(folder / INDEX)
        (folder / INDEX).chmod(0o600)
        copy = Index(folder / INDEX)
        try:
            commit_gc(copy, copy.retired())
            for adapter in copy.adapters():
                make_directory(folder / ADAPTERS / adapter.id)
                for name, sha256 in adapter.files.items():
                    copy_synced(store / ADAPTERS / adapter.id / name, folder / ADAPTERS / adapter.id / name)
                    if _sha256(folder / ADAPTERS / adapter.id / name) != sha256:
                        raise IntegrityError(
                            f"Adapter {adapter.id}: {name} is not what was committed. Run loramem repair first.",
                            what=adapter.id,
                        )
            return
        except FileNotFoundError:
            if last:
                raise
        finally:
            copy.close()


def _leave_behind(store: Path, folder: Path) -> None:
    copy = Index(folder / INDEX)
    try:
        copy_synced(store / MANIFEST, folder / MANIFEST)
        manifest = replace(read_manifest(folder, copy), location=None)
        manifest.save(folder)
        commit_export(copy, manifest.sha256)
        copy.vacuum()
    finally:
        copy.close()


def _pack(folder: Path, names: list[str], target: Path) -> None:
    with target.open("xb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        target.chmod(0o600)
        for name in names:
            member = tarfile.TarInfo(name)
            member.size, member.mode = (folder / name).stat().st_size, 0o600
            with (folder / name).open("rb") as content:
                tar.addfile(member, content)


class _Files:
    """Content by name, of a directory or a tar file; None for what is not there or not a plain file."""

    def __init__(self, source: Path, tar: tarfile.TarFile | None) -> None:
        self.source, self.tar = source, tar

    def __call__(self, name: str) -> bytes | None:
        with _reading(self.source):
            if self.tar is None:
                path = self.source / name
                return path.read_bytes() if path.is_file() and not path.is_symlink() else None
            try:
                member = self.tar.getmember(name)
            except KeyError:
                return None
            file = self.tar.extractfile(member) if member.isreg() else None
            return file.read() if file else None


@contextmanager
def _read(source: Path) -> Iterator[_Files]:
    if source.is_dir():
        yield _Files(source, None)
        return
    with _reading(source):
        tar = tarfile.open(source, "r:")  # noqa: SIM115 - what is done with its content is no trouble of the source
    with tar:
        yield _Files(source, tar)


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, tarfile.TarError) as error:
        raise BundleError(f"{source} is not an export of a store, or cannot be read ({error}).") from None


def _listed(content: bytes | None, source: Path) -> dict[str, str]:
    try:
        fields = json.loads(content or b"")
        found, files = fields["format"], dict(fields["files"])
    except (ValueError, KeyError, TypeError):
        raise BundleError(f"{source} is not an export of a store: it has no readable {NAME}.") from None
    if found != FORMAT:
        raise BundleError(f"{source} has export format {found}; this version reads {FORMAT}. Upgrade loramem.")
    if strange := [name for name in files if not _MEMBER.fullmatch(name)]:
        raise BundleError(f"{source} lists {strange[0]!r}, which no store holds. It is not read.")
    if not {MANIFEST, INDEX} <= set(files):
        raise BundleError(f"{source} lists no {MANIFEST} or no {INDEX}.")
    return files


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
