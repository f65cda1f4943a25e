"""What each address of the tests' Hub answers, as huggingface_hub 2.4 reads it."""

import base64
import fnmatch
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

from .hub_faults import Answer, Refusal
from .hub_repository import Commit, File, Repository, is_lfs

DATE = "2026-01-01T00:00:00.000Z"
GITATTRIBUTES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}  # in every new repository


@dataclass(frozen=True)
class Call:
    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("true", "1")


def answered(content: Any, **headers: str) -> Answer:
    return Answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"} | headers)


class Hub:
    """Repositories of models, what a test does to them, and what is answered to requests.

    `token` is the one that may write, and read what is private, in the name of `user`.
    """

    url = ""

    def __init__(self, token: str = "hf_of_the_tests", user: str = "me") -> None:
        self.token, self.user = token, user
        self.repositories: dict[str, Repository] = {}
        self._lock = threading.RLock()

    def create(self, repo_id: str, private: bool = False) -> str:
        """A repository with its first commit, whose id is returned."""
        with self._lock:
            self.repositories[repo_id] = Repository(private)
            return self.commit(repo_id, GITATTRIBUTES, title="initial commit")

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        deleted: Iterable[str] = (),
        branch: str = "main",
        title: str = "a commit",
    ) -> str:
        """A commit written directly, with no rule for names, so that they may be hostile; returns its id."""
        added = {path: File(content, is_lfs(path, len(content))) for path, content in files.items()}
        with self._lock:
            return self.repositories[repo_id].commit(branch, title, added, tuple(deleted)).id

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.repositories[repo_id].at(revision).files.items()}

    def head(self, repo_id: str, branch: str = "main") -> Commit:
        return self.repositories[repo_id].at(branch)

    def perform(self, call: Call) -> Answer:
        """Do what is asked for. Raises Refusal."""
        for method, pattern, act in ROUTES:
            if call.method in method and (match := re.fullmatch(pattern, call.path)):
                return act(self, call, *(unquote(group) for group in match.groups() if group is not None))
        raise Refusal(404, "", f"no such address: {call.method} {call.path}")

    def _signed_in(self, call: Call) -> bool:
        given = call.headers.get("Authorization")
        if given not in (None, f"Bearer {self.token}"):
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return given is not None

    def _repository(self, call: Call, repo_id: str, write: bool = False) -> Repository:
        signed_in = self._signed_in(call)
        repository = self.repositories.get(repo_id)
        if not signed_in and (write or repository is None or repository.private):
            raise Refusal(401, "RepoNotFound", "Invalid username or password.")
        if repository is None:
            raise Refusal(404, "RepoNotFound", "Repository not found")
        if write:
            self._own(repo_id)
        return repository

    def _own(self, repo_id: str) -> None:
        if not repo_id.startswith(f"{self.user}/"):
            raise Refusal(403, "", f"You don't have the rights to write to {repo_id}")

    def _named(self, call: Call) -> str:
        if not self._signed_in(call):
            raise Refusal(401, "", "Invalid username or password.")
        return f"{call.json.get('organization') or self.user}/{call.json['name']}"

    def create_repo(self, call: Call) -> Answer:
        repo_id = self._named(call)
        self._own(repo_id)
        if repo_id in self.repositories:
            there = {"error": "You already created this model repo", "url": f"{self.url}/{repo_id}"}  # read if exist_ok
            return replace(answered(there), status=409)
        self.create(repo_id, private=call.json.get("visibility") == "private")
        return answered({"url": f"{self.url}/{repo_id}", "name": repo_id})

    def validate_yaml(self, call: Call) -> Answer:
        """The front matter's frame, and that the base model is an id; the Hub's own rules are many more."""
        text = call.json["content"]
        front = re.match(r"---\n(.*?\n)?---\n", text, re.DOTALL)
        if front is None and text.startswith("---"):
            return replace(answered({"errors": [{"message": "unterminated metadata"}], "warnings": []}), status=400)
        base = re.search(r"^base_model:[ ]*(\S+)", front.group() if front else "", re.MULTILINE)
        if base and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base[1]):
            message = f'"base_model" with value "{base[1]}" is not valid. Use a model id from https://hf.co/models.'
            return replace(answered({"errors": [{"message": message}], "warnings": []}), status=400)
        missing = [] if front else [{"message": "empty or missing yaml metadata in repo card"}]
        return answered({"errors": [], "warnings": missing})

    def info(self, call: Call, repo_id: str, revision: str = "main") -> Answer:
        repository = self._repository(call, repo_id)
        commit = repository.at(revision)
        siblings: list[dict[str, Any]] = []
        for path, file in sorted(commit.files.items()):
            entry = file.entry(path)
            details = {"size": entry["size"], "blobId": entry["oid"], "lfs": entry.get("lfs")}
            siblings.append({"rfilename": path} | (details if call.flag("blobs") else {}))
        facts = {"id": repo_id, "modelId": repo_id, "sha": commit.id, "private": repository.private, "gated": False}
        more = {"disabled": False, "tags": [], "downloads": 0, "likes": 0, "createdAt": DATE, "lastModified": DATE}
        return answered(facts | more | {"siblings": siblings})

    def tree(self, call: Call, repo_id: str, revision: str, folder: str = "") -> Answer:
        commit = self._repository(call, repo_id).at(revision)
        within = f"{folder}/" if folder else ""
        paths = sorted(path for path in commit.files if path.startswith(within))
        if folder and not paths:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        entries: dict[str, dict[str, Any]] = {}
        last = {"lastCommit": {"id": commit.id, "title": commit.title, "date": DATE}} if call.flag("expand") else {}
        for path in paths:
            below = path.removeprefix(within).split("/")
            for depth in range(1, len(below)):
                name = within + "/".join(below[:depth])
                if depth == 1 or call.flag("recursive"):
                    oid = hashlib.sha1(name.encode()).hexdigest()
                    entries[name] = {"type": "directory", "oid": oid, "size": 0, "path": name} | last
            if len(below) == 1 or call.flag("recursive"):
                entries[path] = {"type": "file"} | commit.files[path].entry(path) | last
        return answered(list(entries.values()))

    def preupload(self, call: Call, repo_id: str, revision: str) -> Answer:
        there = self._repository(call, repo_id, write=True).at(revision).files
        ignored = call.json.get("gitIgnore", "").split()
        files = []
        for file in call.json["files"]:
            path = file["path"]
            mode = "lfs" if is_lfs(path, file["size"]) else "regular"
            ignore = any(fnmatch.fnmatch(path, line) for line in ignored)
            known = {"oid": there[path].etag} if path in there else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": ignore} | known)
        return answered({"files": files})

    def lfs_batch(self, call: Call, repo_id: str) -> Answer:
        repository = self._repository(call, repo_id, write=True)
        objects: list[dict[str, Any]] = []
        for wanted in call.json["objects"]:
            at = f"{self.url}/lfs/{repo_id}/{wanted['oid']}"
            actions = {"actions": {"upload": {"href": at}, "verify": {"href": f"{at}/verify"}}}
            objects.append(dict(wanted) | ({} if wanted["oid"] in repository.objects else actions))
        return answered({"transfer": "basic", "objects": objects})

    def lfs_put(self, call: Call, repo_id: str, oid: str) -> Answer:
        # The client sends no token here: the Hub's address is signed instead.
        if hashlib.sha256(call.body).hexdigest() != oid:
            raise Refusal(400, "", "The Content-SHA256 you specified did not match what we received.")
        self.repositories[repo_id].objects[oid] = call.body
        return Answer()

    def lfs_verify(self, call: Call, repo_id: str, oid: str) -> Answer:
        if len(self._repository(call, repo_id, write=True).objects.get(oid, b"")) != call.json["size"]:
            raise Refusal(404, "", f"Object {oid} was not uploaded")
        return Answer()

    def commit_files(self, call: Call, repo_id: str, branch: str) -> Answer:
        repository = self._repository(call, repo_id, write=True)
        if branch not in repository.branches:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        parent = repository.at(branch)
        lines = [json.loads(line) for line in call.body.splitlines()]
        head = next(line["value"] for line in lines if line["key"] == "header")
        if head.get("parentCommit", parent.id) != parent.id:
            raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
        added: dict[str, File] = {}
        deleted: list[str] = []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                added[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in repository.objects:
                    raise Refusal(400, "", f"LFS object {value['oid']} of {value['path']} was not uploaded")
                added[value["path"]] = File(repository.objects[value["oid"]], lfs=True)
            elif line["key"] in ("deletedFile", "deletedFolder"):
                name = value["path"].rstrip("/")
                folder = line["key"] == "deletedFolder"
                gone = [path for path in parent.files if path == name or (folder and path.startswith(f"{name}/"))]
                if not gone:
                    raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
                deleted += gone
        if any(part in ("", ".", "..", ".git") for path in added for part in path.split("/")):
            raise Refusal(400, "", "Invalid path")
        made = repository.commit(branch, head["summary"], added, deleted)
        return answered({"success": True, "commitOid": made.id, "commitUrl": f"{self.url}/{repo_id}/commit/{made.id}"})

    def resolve(self, call: Call, repo_id: str, revision: str, path: str) -> Answer:
        commit = self._repository(call, repo_id).at(revision)
        named = {"X-Repo-Commit": commit.id}
        if path not in commit.files:
            raise Refusal(404, "EntryNotFound", "Entry not found", **named)
        file = commit.files[path]
        size = len(file.content)
        named |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            named |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(size)}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range") or ""):
            start, end = int(asked[1]), min(int(asked[2] or size), size - 1)
            if start >= size:
                raise Refusal(416, "", "Range Not Satisfiable", **{"Content-Range": f"bytes */{size}"})
            part = {"Content-Range": f"bytes {start}-{end}/{size}"}
            return Answer(206, file.content[start : end + 1], named | part)
        return Answer(200, file.content, named)


ID, NAME = r"([^/]+/[^/]+)", r"([^/]+)"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("POST", "/api/repos/create", Hub.create_repo),
    ("POST", "/api/validate-yaml", Hub.validate_yaml),
    ("GET", f"/api/models/{ID}", Hub.info),
    ("GET", f"/api/models/{ID}/revision/{NAME}", Hub.info),
    ("GET", f"/api/models/{ID}/tree/{NAME}(?:/(.+))?", Hub.tree),
    ("POST", f"/api/models/{ID}/preupload/{NAME}", Hub.preupload),
    ("POST", f"/api/models/{ID}/commit/{NAME}", Hub.commit_files),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", Hub.lfs_batch),
    ("PUT", f"/lfs/{ID}/{NAME}", Hub.lfs_put),
    ("POST", f"/lfs/{ID}/{NAME}/verify", Hub.lfs_verify),
    ("GET HEAD", f"/{ID}/resolve/{NAME}/(.+)", Hub.resolve),
]
