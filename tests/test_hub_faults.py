"""What huggingface_hub 2.4 makes of a Hub that fails, as the tests' Hub shows it. Push and pull rest on this.

"Waits" are the client's own pauses between tries: 1, 2, 4, 8 and 8 s where it backs off, 1 s each where a download
goes on. "Raw" is an error of its HTTP library, outside the tree of `huggingface_hub.errors`: RemoteProtocolError for
a connection dropped, cut short or with headers above 100 kB, ReadTimeout, ConnectError.

    hf_hub_download asks HEAD, then GET
      HEAD 500, 503, 429           once more at once, then with five waits; then LocalEntryNotFoundError
      HEAD slow                    a second try with 60 s instead of etag_timeout (10 s)
      HEAD dropped, long header    raw, at once
      HEAD with another size       OSError "Consistency check failed", or ValueError where it says more than 50 GB
      HEAD with ".." in the ETag   into a local_dir: FileNotFoundError; into the cache: WRITES WHERE IT SAYS
      GET 500, 503                 HfHubHTTPError, at once (429: five waits)
      GET dropped, truncated, slow five times more, one wait each, on from the last whole 10 MiB; then raw
      GET of another size          OSError "Consistency check failed"
      GET of other bytes           NOTHING IS NOTICED: the client compares no hash
      not there                    RemoteEntryNotFoundError; LocalEntryNotFoundError means that no answer came.
                                   Both are EntryNotFoundError, so catching that one takes an outage for an absence.
    list_repo_tree (and within snapshot_download)
      500, dropped, truncated      five waits; then HfHubHTTPError or raw (snapshot_download: LocalEntryNotFoundError
                                   instead of the former)
      not JSON, a field missing    JSONDecodeError, KeyError
      sizes not true               nothing is noticed
      names                        ValueError for "..", "\\", absolute or with a drive, after other files have come;
                                   nothing against .git/config, .cache/huggingface/... (the client's own notes in a
                                   local_dir), line feeds, or a name that is another's folder
    model_info                     500: HfHubHTTPError; dropped: raw; no second try
    create_commit
      preupload, LFS batch         five waits; then HfHubHTTPError or raw
      LFS PUT, verify              five waits; then RuntimeError, the cause in `__cause__`
      commit 412, 500              HfHubHTTPError at once
      commit dropped               raw at once, WHETHER OR NOT IT TOOK EFFECT: look at the head afterwards
    create_repo                    500: HfHubHTTPError; dropped: raw; no second try
    no token                       RepositoryNotFoundError (401); a wrong token: HfHubHTTPError (401); another's: 403
    Hub not reachable              downloads: LocalEntryNotFoundError (a lone file after five waits); else raw
    offline                        downloads: LocalEntryNotFoundError; else OfflineModeIsEnabled; no request, no wait
      a local_dir with anything in snapshot_download RETURNS IT AS IF IT WERE WHOLE, unreachable or offline

Only downloads and model_info(timeout=...) ever time out: every other call waits for an answer for good.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from httpx2 import ConnectError, ReadTimeout, RemoteProtocolError
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from .hub_faults import (
    Fault,
    body,
    dropped,
    header,
    other_bytes,
    rewritten,
    slow,
    stale_parent,
    status,
    truncated,
)
from .hub_server import HubServer

BACKOFF, AGAIN = [1, 2, 4, 8, 8], [1, 1, 1, 1, 1]
WEIGHTS = bytes(range(256)) * 40
ALWAYS = 99
LONG_HEADER = header("X-Long", "x" * 200_000)


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The client's waits, noted instead of waited."""
    noted: list[float] = []
    hurried = SimpleNamespace(**{**vars(time), "sleep": noted.append})
    monkeypatch.setattr("huggingface_hub.utils._http.time", hurried)
    monkeypatch.setattr("huggingface_hub.file_download.time", hurried)
    return noted


@pytest.fixture
def facts(hub: HubServer) -> Iterator[str]:
    hub.create("me/facts")
    yield hub.commit("me/facts", {"a.safetensors": WEIGHTS, "c.json": b"{}"})


def download(folder: Path) -> bytes:
    return Path(hf_hub_download("me/facts", "a.safetensors", local_dir=folder)).read_bytes()


def push() -> str:
    operations = [CommitOperationAdd("n.safetensors", WEIGHTS[::-1]), CommitOperationAdd("n.json", b"1")]
    return HfApi().create_commit("me/facts", operations, commit_message="push").oid


@pytest.mark.parametrize(
    ("method", "fault", "times", "waited"),
    [
        ("HEAD", status(500), 1, []),
        ("HEAD", status(500), 3, [1, 2]),
        ("GET", status(429), 2, [1, 2]),
        ("GET", dropped(), 1, [1]),
        ("GET", truncated(), 1, [1]),
    ],
)
def test_a_download_survives_what_passes(
    hub: HubServer,
    facts: str,
    waits: list[float],
    tmp_path: Path,
    method: str,
    fault: Fault,
    times: int,
    waited: list[int],
) -> None:
    hub.fault(fault, method, "/resolve/", times)
    assert download(tmp_path) == WEIGHTS
    assert waits == waited


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
@pytest.mark.parametrize(
    ("method", "fault", "error", "waited"),
    [
        ("HEAD", status(503), LocalEntryNotFoundError, BACKOFF),
        ("HEAD", dropped(), RemoteProtocolError, []),
        ("HEAD", LONG_HEADER, RemoteProtocolError, []),
        ("HEAD", header("X-Linked-Size", "5"), OSError, []),
        ("HEAD", header("X-Linked-Size", str(10**15)), ValueError, []),
        ("HEAD", header("X-Linked-Etag", "../../../../x"), FileNotFoundError, []),
        ("GET", status(500), HfHubHTTPError, []),
        ("GET", dropped(), RemoteProtocolError, AGAIN),
        ("GET", LONG_HEADER, RemoteProtocolError, AGAIN),
        ("GET", truncated(), RemoteProtocolError, AGAIN),
        ("GET", header("Content-Length", str(10**12)), RemoteProtocolError, AGAIN),
        ("GET", body(b"short"), OSError, []),
        ("GET", body(WEIGHTS * 2), OSError, []),
    ],
)
def test_a_download_gives_up(
    hub: HubServer,
    facts: str,
    waits: list[float],
    tmp_path: Path,
    method: str,
    fault: Fault,
    error: type[Exception],
    waited: list[int],
) -> None:
    hub.fault(fault, method, "/resolve/", ALWAYS)
    with pytest.raises(error):
        download(tmp_path)
    assert waits == waited
    assert not (tmp_path / "a.safetensors").exists()


def test_a_slow_download_times_out(
    hub: HubServer, facts: str, waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.fault(slow(5), "GET", "/resolve/", ALWAYS)
    with pytest.raises(ReadTimeout):
        download(tmp_path)
    assert waits == AGAIN


def test_a_large_download_goes_on_where_it_was_cut(
    hub: HubServer, facts: str, waits: list[float], tmp_path: Path
) -> None:
    large = WEIGHTS * 2080  # 21.3 MB, of whose first half the client keeps whole pieces of 10 MiB
    hub.commit("me/facts", {"a.safetensors": large})
    hub.fault(truncated(), "GET", "/resolve/")
    assert download(tmp_path) == large
    assert waits == [1]
    assert [r.sent_bytes for r in hub.requests if r.method == "GET"] == [len(large) // 2, len(large) - 10 * 2**20]


def test_other_bytes_of_the_same_size_are_not_noticed(hub: HubServer, facts: str, tmp_path: Path) -> None:
    hub.fault(other_bytes(), "GET", "/resolve/")
    assert download(tmp_path) == bytes(byte ^ 1 for byte in WEIGHTS)


def test_an_etag_with_dots_leaves_the_cache(hub: HubServer, facts: str, tmp_path: Path) -> None:
    hub.fault(header("X-Linked-Etag", "../../../escaped"), "HEAD", "/resolve/")
    hf_hub_download("me/facts", "a.safetensors", cache_dir=tmp_path / "cache")
    assert (tmp_path / "escaped").exists()


@pytest.mark.parametrize(
    ("fault", "error", "waited"),
    [
        (status(500), HfHubHTTPError, BACKOFF),
        (dropped(), RemoteProtocolError, BACKOFF),
        (truncated(), RemoteProtocolError, BACKOFF),
        (body(b"<html>"), json.JSONDecodeError, []),
        (rewritten(lambda tree: [{"type": "file"}]), KeyError, []),
    ],
)
def test_a_listing_gives_up(
    hub: HubServer, facts: str, waits: list[float], fault: Fault, error: type[Exception], waited: list[int]
) -> None:
    hub.fault(fault, "GET", "/tree/", ALWAYS)
    with pytest.raises(error):
        list(HfApi().list_repo_tree("me/facts"))
    assert waits == waited


def test_sizes_in_a_listing_are_taken_as_they_come(hub: HubServer, facts: str, tmp_path: Path) -> None:
    hub.fault(rewritten(lambda tree: [{**entry, "size": 10**15} for entry in tree]), "GET", "/tree/", 2)
    assert {entry.size for entry in HfApi().list_repo_tree("me/facts")} == {10**15}
    assert (Path(snapshot_download("me/facts", local_dir=tmp_path)) / "a.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    "name", ["../evil.json", "sub/../../evil.json", "{out}/evil.json", "..\\evil.json", "C:/evil.json"]
)
def test_names_that_lead_out_are_refused(hub: HubServer, facts: str, tmp_path: Path, name: str) -> None:
    hub.commit("me/facts", {name.format(out=tmp_path): b"{}"})
    with pytest.raises(ValueError, match="Invalid filename"):
        snapshot_download("me/facts", local_dir=tmp_path / "in" / "here")
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("name", [".git/config", ".cache/huggingface/download/c.json.metadata", "a\nb.json"])
def test_other_hostile_names_are_written(hub: HubServer, facts: str, tmp_path: Path, name: str) -> None:
    hub.commit("me/facts", {name: b"hostile"})
    hf_hub_download("me/facts", name, local_dir=tmp_path)
    assert (tmp_path / name).read_bytes() == b"hostile"


PUT = "^/lfs/me/facts/[0-9a-f]+$"


@pytest.mark.parametrize(
    ("method", "route", "fault"),
    [
        ("POST", "/preupload/", status(500)),
        ("POST", "/objects/batch", dropped()),
        ("PUT", PUT, status(503)),
        ("PUT", PUT, dropped(performed=True)),
        ("POST", "/verify$", status(500)),
    ],
)
def test_a_push_survives_what_passes(
    hub: HubServer, facts: str, waits: list[float], method: str, route: str, fault: Fault
) -> None:
    hub.fault(fault, method, route)
    assert push() == hub.head("me/facts").id
    assert hub.files("me/facts")["n.safetensors"] == WEIGHTS[::-1]
    assert waits == [1]


@pytest.mark.parametrize(
    ("method", "route", "fault", "error", "waited"),
    [
        ("POST", "/preupload/", status(500), HfHubHTTPError, BACKOFF),
        ("POST", "/objects/batch", dropped(), RemoteProtocolError, BACKOFF),
        ("PUT", PUT, status(500), RuntimeError, BACKOFF),
        ("PUT", PUT, status(413), RuntimeError, []),
        ("POST", "/verify$", dropped(), RuntimeError, BACKOFF),
        ("POST", "/commit/", status(500), HfHubHTTPError, []),
        ("POST", "/commit/", stale_parent(), HfHubHTTPError, []),
        ("POST", "/commit/", dropped(), RemoteProtocolError, []),
    ],
)
def test_a_push_gives_up_and_nothing_changes(
    hub: HubServer,
    facts: str,
    waits: list[float],
    method: str,
    route: str,
    fault: Fault,
    error: type[Exception],
    waited: list[int],
) -> None:
    hub.fault(fault, method, route, ALWAYS)
    with pytest.raises(error) as given_up:
        push()
    assert hub.head("me/facts").id == facts
    assert waits == waited
    assert (given_up.value.__cause__ is not None) or error is not RuntimeError


@pytest.mark.parametrize("fault", [dropped(performed=True), truncated(), LONG_HEADER])
def test_a_commit_can_take_effect_though_the_client_raises(hub: HubServer, facts: str, fault: Fault) -> None:
    hub.fault(fault, "POST", "/commit/")
    with pytest.raises(RemoteProtocolError):
        push()
    assert hub.head("me/facts").parent == facts


def test_a_refused_parent_is_told_by_its_status(hub: HubServer, facts: str) -> None:
    hub.fault(stale_parent(), "POST", "/commit/")
    with pytest.raises(HfHubHTTPError) as refused:
        push()
    assert refused.value.response.status_code == 412


def test_information_is_asked_for_once(hub: HubServer, facts: str, waits: list[float]) -> None:
    api = HfApi()
    for fault, error in ((status(500), HfHubHTTPError), (dropped(), RemoteProtocolError), (slow(5), ReadTimeout)):
        hub.fault(fault, "GET", "/api/models/me/facts$")
        with pytest.raises(error):
            api.model_info("me/facts", timeout=0.1)
    for fault, error in ((status(500), HfHubHTTPError), (dropped(), RemoteProtocolError)):
        hub.fault(fault, "POST", "/repos/create")
        with pytest.raises(error):
            api.create_repo("me/new")
    assert not waits and api.model_info("me/facts").sha == facts


CALLS: list[Callable[[Path], object]] = [
    lambda folder: download(folder / "file"),
    lambda folder: snapshot_download("me/facts", local_dir=folder / "all"),
    lambda folder: push(),
    lambda folder: HfApi().create_repo("me/new"),
    lambda folder: HfApi().model_info("me/facts"),
]


def test_a_hub_that_is_gone(hub: HubServer, facts: str, tmp_path: Path, waits: list[float]) -> None:
    hub.__exit__()
    for call, error in zip(CALLS, [LocalEntryNotFoundError] * 2 + [ConnectError] * 3, strict=True):
        with pytest.raises(error):
            call(tmp_path)
    assert waits == BACKOFF * 2  # the download's and the push's


def test_offline_nothing_is_asked(
    hub: HubServer, facts: str, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for call, error in zip(CALLS, [LocalEntryNotFoundError] * 2 + [OfflineModeIsEnabled] * 3, strict=True):
        with pytest.raises(error):
            call(tmp_path)
    assert not hub.requests and not waits


def test_a_folder_with_a_part_passes_for_the_whole_when_the_hub_is_gone(
    hub: HubServer, facts: str, tmp_path: Path
) -> None:
    download(tmp_path)
    hub.__exit__()
    assert Path(snapshot_download("me/facts", local_dir=tmp_path)) == tmp_path
    assert not (tmp_path / "c.json").exists()
