"""A store copied as one committed state: backups, and exports that another machine can import.

A backup is a store as it is. An export leaves behind what is about this machine or not committed (the base model's
folder, the journal), and lists every file with its sha256, as a directory or a single tar file.
"""

import hashlib
import json
import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from loramem.checks import problems
from loramem.commits import commit_export, commit_gc
from loramem.errors import BundleError, IntegrityError, StoreError
from loramem.files import copy_synced, make_directory, remove_directory, size_bytes, sync_directory, write_synced
from loramem.index import NAME as INDEX
from loramem.index import Index
from loramem.manifest import NAME as MANIFEST
from loramem.manifest import read_manifest
from loramem.staging import ADAPTERS

FORMAT, NAME = 1, "bundle.json"
_MEMBER = re.compile(
    r"store\.json|index\.db|adapters/[0-9a-f]{32}/(adapter_model\.safetensors|adapter_config\.json|README\.md)"
)


def backup(store: Path, index: Index, target: Path) -> int:
    """Copy a store, which may be written to meanwhile, as it was committed at one moment; returns the bytes.

    Raises:
        StoreError: There is something at ``target``.
        IntegrityError: A file is not what was committed: damage is not copied.
    """
    with _new(target) as partial:
        _copy(store, index, partial)
        copy_synced(store / MANIFEST, partial / MANIFEST)
        return _size(partial)


def export(store: Path, index: Index, target: Path) -> int:
    """Write a store to a directory, or to one file if ``target`` ends in .tar; returns the bytes.

    Raises as `backup`.
    """
    single = target.suffix == ".tar"
    with _new(target) as partial:
        folder = partial.with_name(partial.name + ".files") if single else partial
        remove_directory(folder)
        make_directory(folder)
        try:
            _copy(store, index, folder)
            _leave_behind(store, folder)
            names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            listed = {name: _sha256(folder / name) for name in names}
            write_synced(folder / NAME, (json.dumps({"format": FORMAT, "files": listed}, indent=2) + "\n").encode())
            if single:
                partial.rmdir()
                _pack(folder, [NAME, *names], partial)
            return _size(partial)
        finally:
            if single:
                remove_directory(folder)


def import_bundle(source: Path, target: Path) -> None:
    """Make a store of an export, after checking every file, row and seal.

    Files that the bundle's manifest does not list, or that no store has, are not read. The values are not decoded:
    `verify` does, with the base model at hand.

    Raises:
        BundleError: Not an export, a damaged one, or one of a newer format.
        StoreError: There is something at ``target``.
    """
    with _new(target) as partial:
        with _read(source) as content:
            listed = _listed(content(NAME), source)
            for name, sha256 in listed.items():
                data = content(name)
                if data is None or hashlib.sha256(data).hexdigest() != sha256:
                    raise BundleError(f"{source}: {name} is not what was exported. Export again.")
                make_directory((partial / name).parent)
                write_synced(partial / name, data)
        index = Index.open(partial / INDEX)
        found = list(problems(partial, index))
        index.close()
        if found:
            raise BundleError(f"{source} holds a damaged store: {found[0]}.")


def _copy(store: Path, index: Index, folder: Path) -> None:
    """Index and adapters of one committed state; once more if `gc` was faster than the copy."""
    for last in (False, True):
        (folder / INDEX).unlink(missing_ok=True)
        index.db.execute("VACUUM INTO ?", [str(folder / INDEX)])
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


@contextmanager
def _new(target: Path) -> Iterator[Path]:
    """A place beside the target, renamed to it at the end; what was left there by a crash is removed first."""
    if target.exists():
        raise StoreError(f"{target} exists already. Give another path.")
    partial = target.with_name(target.name + ".partial")
    remove_directory(partial)
    make_directory(partial)
    try:
        yield partial
        partial.rename(target)
        sync_directory(target.parent)
    except BaseException:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
        raise


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

    def __init__(self, folder: Path | None, tar: tarfile.TarFile | None) -> None:
        self.folder, self.tar = folder, tar

    def __call__(self, name: str) -> bytes | None:
        if self.folder is not None:
            path = self.folder / name
            return path.read_bytes() if path.is_file() and not path.is_symlink() else None
        assert self.tar is not None
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
    try:
        with tarfile.open(source) as tar:
            yield _Files(None, tar)
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


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else size_bytes(path)
