"""Durable files: written beside, synced, renamed."""

import os
from pathlib import Path


def write_synced(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Replace a file so that after a crash it holds the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_directory(path.parent)


def write_directory(path: Path, files: dict[str, bytes]) -> None:
    """Create a directory of synced files."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, content in files.items():
        write_synced(path / name, content)


def move_synced(source: Path, target: Path) -> None:
    """Rename a directory durably; a target that exists already is left alone (same content, same name)."""
    if not target.exists():
        source.rename(target)
        sync_directory(target.parent)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
