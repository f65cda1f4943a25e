"""The folder of unfinished writes, and what of a store's files no committed row needs."""

import shutil
from pathlib import Path

from loramem.index import Index

NAME = "staging"


def clean(store: Path, index: Index, *, keep_staged: bool = False) -> None:
    """Remove what no committed row needs: adapters of a write that never committed, and what was staged.

    Args:
        keep_staged: Leave staged shards for a write that goes on.
    """
    if not keep_staged:
        shutil.rmtree(store / NAME, ignore_errors=True)
    committed = {adapter.id for adapter in index.adapters()}
    for folder in (store / "adapters").glob("*"):
        if folder.name not in committed:
            shutil.rmtree(folder, ignore_errors=True)
