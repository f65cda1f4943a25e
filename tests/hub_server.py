"""A small Hub over HTTP on 127.0.0.1: what an unmodified huggingface_hub 2.4 asks for, and faults on request.

Repositories of models live in memory, every commit of theirs readable for good. Uploads use basic LFS, so the client
needs HF_HUB_DISABLE_XET=1. Answers follow https://huggingface.co as the client reads them, with one difference: a
401 for a repository says RepoNotFound, since the client infers that from https addresses alone.

    with HubServer() as hub:
        hub.create("me/facts", private=True)
        hub.fault(status(500), "GET", "/resolve/", times=2)
"""

import base64
import fnmatch
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from .hub_faults import Answer, Fault, Refusal

LFS_SUFFIXES = (".safetensors", ".bin", ".npz", ".gz", ".db")
LFS_SIZE_BYTES = 10_000_000  # larger files are LFS whatever their name
DATE = "2026-01-01T00:00:00.000Z"
GITATTRIBUTES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}  # in every new repository


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


@dataclass(frozen=True)
class Request:
    """A request as it came: bytes of its body, and bytes of the answer's."""

    method: str
    path: str
    received_bytes: int
    sent_bytes: int
    status: int


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


def is_lfs(path: str, size_bytes: int) -> bool:
    return size_bytes > 0 and (path.endswith(LFS_SUFFIXES) or size_bytes > LFS_SIZE_BYTES)


def answered(content: Any, **headers: str) -> Answer:
    return Answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"} | headers)


class HubServer:
    """The server, in a thread of its own; a context manager.

    `token` is the one that may write, and read what is private, in the name of `user`; listings come in pages of
    `page_size`. `requests` holds every request since the start; clear it as you like.
    """

    def __init__(self, token: str = "hf_of_the_tests", user: str = "me", page_size: int = 1000) -> None:
        self.token, self.user, self.page_size = token, user, page_size
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self._faults: list[tuple[Fault, str, re.Pattern[str]]] = []
        self._lock = threading.RLock()
        self._closing = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()  # ends slow answers
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def environment(self, home: str) -> dict[str, str]:
        """Variables that send a new process's huggingface_hub here, with this server's token and a cache in `home`.

        The process must not inherit HF_HUB_OFFLINE=1, which wins: an empty value is "no".
        """
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": home,
            "HF_HUB_DISABLE_XET": "1",  # else uploads go to Xet wherever hf_xet is installed
            "HF_HUB_DISABLE_TELEMETRY": "1",  # else the client asks for more than the test did
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "",
        }

    # What a test does to repositories with no client: no rules hold, so names may be as hostile as a test needs.

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
        """A commit written directly; returns its id."""
        added = {path: File(content, is_lfs(path, len(content))) for path, content in files.items()}
        with self._lock:
            return self.repositories[repo_id].commit(branch, title, added, tuple(deleted)).id

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.repositories[repo_id].at(revision).files.items()}

    def head(self, repo_id: str, branch: str = "main") -> Commit:
        return self.repositories[repo_id].at(branch)

    def fault(self, fault: Fault, method: str, pattern: str, times: int = 1) -> None:
        """Spoil the next `times` requests of this method in whose path the pattern is found."""
        with self._lock:
            self._faults += [(fault, method, re.compile(pattern))] * times

    # Requests.

    def respond(self, call: Call) -> Answer:
        with self._lock:
            fault = next((f for f in self._faults if f[1] == call.method and f[2].search(call.path)), None)
            if fault:
                self._faults.remove(fault)
            performed = fault is None or fault[0].performed
            try:
                answer = self._perform(call) if performed else Answer()
            except Refusal as refusal:
                answer = refusal.answer
            answer = fault[0].change(answer) if fault else answer
            sent = 0 if call.method == "HEAD" else len(answer.body)
            self.requests.append(Request(call.method, call.path, len(call.body), sent, answer.status))
        self._closing.wait(answer.delay_s)
        return answer

    def _perform(self, call: Call) -> Answer:
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

    def whoami(self, call: Call) -> Answer:
        if not self._signed_in(call):
            raise Refusal(401, "", "Invalid username or password.")
        return answered({"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def create_repo(self, call: Call) -> Answer:
        repo_id = self._named(call)
        self._own(repo_id)
        if repo_id in self.repositories:
            there = {"error": "You already created this model repo", "url": f"{self.url}/{repo_id}"}  # read if exist_ok
            return replace(answered(there), status=409)
        self.create(repo_id, private=call.json.get("visibility") == "private")
        return answered({"url": f"{self.url}/{repo_id}", "name": repo_id})

    def delete_repo(self, call: Call) -> Answer:
        repo_id = self._named(call)
        self._repository(call, repo_id, write=True)
        del self.repositories[repo_id]
        return answered({})

    def settings(self, call: Call, repo_id: str) -> Answer:
        repository = self._repository(call, repo_id, write=True)
        if "visibility" in call.json:
            repository.private = call.json["visibility"] == "private"
        return answered({"private": repository.private})

    def branch(self, call: Call, repo_id: str, name: str) -> Answer:
        repository = self._repository(call, repo_id, write=True)
        if name in repository.branches:
            raise Refusal(409, "", "Reference already exists")
        repository.branches[name] = repository.at(call.json.get("startingPoint", "main")).id
        return answered({})

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

    def commits(self, call: Call, repo_id: str, revision: str) -> Answer:
        repository = self._repository(call, repo_id)
        history = [repository.at(revision)]
        while history[-1].parent:
            history.append(repository.at(history[-1].parent))
        return answered([{"id": c.id, "title": c.title, "message": "", "authors": [], "date": DATE} for c in history])

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
        start = int(call.query.get("cursor", ["0"])[0])
        end = start + self.page_size
        query = f"recursive={call.flag('recursive')}&expand={call.flag('expand')}&cursor={end}"
        following = {"Link": f'<{self.url}{call.path}?{query}>; rel="next"'} if end < len(entries) else {}
        return answered(list(entries.values())[start:end], **following)

    def paths_info(self, call: Call, repo_id: str, revision: str) -> Answer:
        files = self._repository(call, repo_id).at(revision).files
        asked = parse_qs(call.body.decode()).get("paths", [])
        return answered([{"type": "file"} | files[path].entry(path) for path in asked if path in files])

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
    ("GET", "/api/whoami-v2", HubServer.whoami),
    ("POST", "/api/repos/create", HubServer.create_repo),
    ("DELETE", "/api/repos/delete", HubServer.delete_repo),
    ("POST", "/api/validate-yaml", HubServer.validate_yaml),
    ("GET", f"/api/models/{ID}", HubServer.info),
    ("GET", f"/api/models/{ID}/revision/{NAME}", HubServer.info),
    ("GET", f"/api/models/{ID}/commits/{NAME}", HubServer.commits),
    ("GET", f"/api/models/{ID}/tree/{NAME}(?:/(.+))?", HubServer.tree),
    ("PUT", f"/api/models/{ID}/settings", HubServer.settings),
    ("POST", f"/api/models/{ID}/branch/{NAME}", HubServer.branch),
    ("POST", f"/api/models/{ID}/paths-info/{NAME}", HubServer.paths_info),
    ("POST", f"/api/models/{ID}/preupload/{NAME}", HubServer.preupload),
    ("POST", f"/api/models/{ID}/commit/{NAME}", HubServer.commit_files),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", HubServer.lfs_batch),
    ("PUT", f"/lfs/{ID}/{NAME}", HubServer.lfs_put),
    ("POST", f"/lfs/{ID}/{NAME}/verify", HubServer.lfs_verify),
    ("GET HEAD", f"/{ID}/resolve/{NAME}/(.+)", HubServer.resolve),
]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # headers and body in one packet: two would wait for each other
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError):  # the client gave up
            super().handle()

    def _received(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _serve(self) -> None:
        address = urlsplit(self.path)
        call = Call(self.command, address.path, parse_qs(address.query), self.headers, self._received())
        answer = self.hub.respond(call)
        if answer.dropped:
            self.close_connection = True
            return
        headers = {"Content-Length": str(len(answer.body))} | dict(answer.headers)
        self.close_connection |= headers["Content-Length"] != str(len(answer.body))
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815
