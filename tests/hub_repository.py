"""Repositories of the tests' Hub, in memory: every commit with all of its files, readable for good."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .hub_faults import Refusal

LFS_SUFFIXES = (".safetensors", ".bin", ".npz", ".gz", ".db")
LFS_SIZE_BYTES = 10_000_000  # larger files are LFS whatever their name


def is_lfs(path: str, size_bytes: int) -> bool:
    return size_bytes > 0 and (path.endswith(LFS_SUFFIXES) or size_bytes > LFS_SIZE_BYTES)


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool

    @property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id

    def entry(self, path: str) -> dict[str, Any]:
        pointer = {"lfs": {"oid": self.sha256, "sha256": self.sha256, "size": len(self.content), "pointerSize": 134}}
        return {"path": path, "oid": self.blob_id, "size": len(self.content)} | (pointer if self.lfs else {})


@dataclass(frozen=True)
class Commit:
    """One commit: all files as of then, and the paths that it added (or replaced) and deleted."""

    id: str
    parent: str | None
    title: str
    files: Mapping[str, File]
    added: tuple[str, ...]
    deleted: tuple[str, ...]


@dataclass
class Repository:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)  # oldest first
    branches: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS, by sha256

    def at(self, revision: str) -> Commit:
        commit = self.commits.get(self.branches.get(revision, revision))
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def commit(self, branch: str, title: str, added: Mapping[str, File], deleted: Iterable[str] = ()) -> Commit:
        parent = self.commits.get(self.branches.get(branch, ""))
        files = {path: file for path, file in (parent.files if parent else {}).items() if path not in set(deleted)}
        files |= added
        listed = "".join(f"{path}\0{files[path].etag}\n" for path in sorted(files))
        made = f"{len(self.commits)}\0{parent and parent.id}\0{title}\0{listed}"
        commit_id = hashlib.sha1(made.encode()).hexdigest()
        commit = Commit(commit_id, parent and parent.id, title, files, tuple(sorted(added)), tuple(sorted(deleted)))
        self.commits[commit_id] = commit
        self.branches[branch] = commit_id
        self.objects |= {file.sha256: file.content for file in added.values() if file.lfs}
        return commit
