"""A new, empty store."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from loramem import embedded
from loramem._util.files import PRIVATE_FOLDER, make_directory, outside_stores
from loramem.errors import StoreFormatError, StoreLocked, UnsupportedBaseModel
from loramem.index.commits import seal_index
from loramem.index.index import NAME as INDEX
from loramem.index.index import Index
from loramem.index.lock import HOLDER, LOCK, write_lock
from loramem.models.dtypes import Dtype
from loramem.store.manifest import NAME as MANIFEST
from loramem.store.manifest import Manifest
from loramem.store.session import ModelOptions

if TYPE_CHECKING:
    from loramem.models.base_model import BaseModel


CREATION_S = 10.0
"""Another process that makes the same store is done in less, its base model being loaded before."""


def create_store(
    path: Path, options: ModelOptions, *, keep_values: bool, serve: Sequence[Dtype] | None = None
) -> "BaseModel | None":
    """Make a store, and give back the base model that it is bound to; None if another process made it meanwhile.

    Raises:
        StoreFormatError: There is something else at the path.
        StoreError: It lies in another store's folder.
        StoreLocked: Another process holds the lock there and makes no store.
        BaseModelNotFound, UnsupportedBaseModel: See `load_base_model`; also for an unknown dtype to serve in.
    """
    from loramem.models.base_model import load_base_model

    if path.exists() and (not path.is_dir() or _foreign(path)):
        if (path / MANIFEST).exists():
            return None
        raise StoreFormatError(f"{path} exists and is not a loramem store. Give another path.")
    outside_stores(path, new=True)
    if options.dtype == "q8_0":
        raise UnsupportedBaseModel("q8_0 is what adapters are served in; a store is written in a dtype: give serve.")
    base = load_base_model(
        options.name or embedded.NAME, revision=options.revision, device=options.device, dtype=options.dtype
    )
    manifest = Manifest.of(base, keep_values=keep_values, serve=serve)
    make_directory(path)
    with suppress(PermissionError):  # an empty folder that was there already, perhaps somebody else's
        path.chmod(PRIVATE_FOLDER)
    try:
        with write_lock(path, CREATION_S):
            if (path / MANIFEST).exists():
                return None
            index = Index(path / INDEX)
            index.migrate()
            seal_index(index, manifest.sha256)
            index.close()
            manifest.save(path)  # last: a folder with a manifest is a whole store
    except StoreLocked:
        if (path / MANIFEST).exists():  # whoever made it is writing to it
            return None
        raise
    return base


def _foreign(path: Path) -> list[Path]:
    """Files that a store whose creation was interrupted would not contain."""
    ours = {INDEX, f"{INDEX}-wal", f"{INDEX}-shm", LOCK, HOLDER, f"{MANIFEST}.partial"}
    return [entry for entry in path.iterdir() if entry.name not in ours]
