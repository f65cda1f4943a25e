"""The tests' Hub, held against the real client."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .hub_server import HubServer

WEIGHTS = bytes(range(256)) * 40


def add(**files: bytes) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path.replace("__", "/").replace("_", "."), content) for path, content in files.items()]


@pytest.fixture
def pushed(hub: HubServer) -> str:
    """The id of the second commit of me/facts: a regular file, a file under LFS, a file in a folder."""
    api = HfApi()
    api.create_repo("me/facts", private=True)
    operations = add(README_md=b"---\nlicense: mit\n---\nHello\n", a_safetensors=WEIGHTS, sub__b_json=b"{}")
    return api.create_commit("me/facts", operations, commit_message="push").oid


def test_a_repository_is_created_once(hub: HubServer) -> None:
    api = HfApi()
    assert api.create_repo("me/facts", private=True).repo_id == "me/facts"
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_repo("me/facts")
    assert refused.value.response.status_code == 409
    api.create_repo("me/facts", exist_ok=True)
    assert api.model_info("me/facts").private is True


def test_a_commit_uploads_regular_files_and_lfs(hub: HubServer, pushed: str) -> None:
    assert hub.files("me/facts")["a.safetensors"] == WEIGHTS
    assert hub.head("me/facts").id == pushed
    assert hub.head("me/facts").added == ("README.md", "a.safetensors", "sub/b.json")
    assert [r.received_bytes for r in hub.requests if r.method == "PUT"] == [len(WEIGHTS)]
    listed = {entry.path: entry for entry in HfApi().list_repo_tree("me/facts", recursive=True)}
    assert set(listed) == {".gitattributes", "README.md", "a.safetensors", "sub", "sub/b.json"}
    assert listed["a.safetensors"].size == listed["a.safetensors"].lfs.size == len(WEIGHTS)
    assert listed["README.md"].lfs is None
    assert HfApi().get_paths_info("me/facts", ["README.md", "none"]) == [listed["README.md"]]


def test_a_second_commit_uploads_only_what_is_new(hub: HubServer, pushed: str) -> None:
    hub.requests.clear()
    operations = [*add(a_safetensors=WEIGHTS, c_safetensors=WEIGHTS[::-1]), CommitOperationDelete("sub/")]
    HfApi().create_commit("me/facts", operations, commit_message="more", parent_commit=pushed)
    assert hub.head("me/facts").added == ("c.safetensors",)
    assert hub.head("me/facts").deleted == ("sub/b.json",)
    assert len([r for r in hub.requests if r.method == "PUT"]) == 1
    assert [c.commit_id for c in HfApi().list_repo_commits("me/facts")][:2] == [hub.head("me/facts").id, pushed]


def test_ignored_files_stay_behind(hub: HubServer, pushed: str) -> None:
    operations = add(_gitignore=b"*.tmp\n", y_json=b"1", z_tmp=b"2")
    HfApi().create_commit("me/facts", operations, commit_message="m")
    assert hub.head("me/facts").added == (".gitignore", "y.json")


def test_a_stale_parent_is_refused_and_nothing_changes(hub: HubServer, pushed: str) -> None:
    newer = hub.commit("me/facts", {"x.json": b"[]"})
    with pytest.raises(HfHubHTTPError) as refused:
        HfApi().create_commit("me/facts", add(y_json=b"1"), commit_message="late", parent_commit=pushed)
    assert refused.value.response.status_code == 412
    assert hub.head("me/facts").id == newer


def test_files_are_downloaded_at_any_commit(hub: HubServer, pushed: str, tmp_path: Path) -> None:
    hub.commit("me/facts", {"a.safetensors": b"newer", "new.json": b"{}"}, deleted=["sub/b.json"])
    assert Path(hf_hub_download("me/facts", "a.safetensors", local_dir=tmp_path)).read_bytes() == b"newer"
    assert Path(hf_hub_download("me/facts", "a.safetensors", revision=pushed)).read_bytes() == WEIGHTS
    whole = Path(snapshot_download("me/facts", revision=pushed, local_dir=tmp_path / "old"))
    assert (whole / "sub" / "b.json").read_bytes() == b"{}" and not (whole / "new.json").exists()
    assert {path.name for path in Path(snapshot_download("me/facts")).iterdir()} >= {"new.json", "a.safetensors"}


def test_what_is_not_there_has_its_own_error(hub: HubServer, pushed: str) -> None:
    api = HfApi()
    with pytest.raises(RepositoryNotFoundError) as missing:
        api.model_info("me/none")
    assert missing.value.response.status_code == 404
    with pytest.raises(RevisionNotFoundError):
        api.model_info("me/facts", revision="0" * 40)
    with pytest.raises(RevisionNotFoundError):
        list(api.list_repo_tree("me/facts", revision="no-such-branch"))
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("me/facts", "no.json")
    with pytest.raises(EntryNotFoundError):
        api.create_commit("me/facts", [CommitOperationDelete("no.json")], commit_message="m")


def test_the_token_decides_who_reads_and_writes(hub: HubServer, pushed: str) -> None:
    hub.create("me/open")
    hub.create("you/open")
    stranger, mistaken = HfApi(token=False), HfApi(token="hf_wrong")
    assert HfApi().whoami()["name"] == "me"
    assert stranger.model_info("me/open").private is False
    for act in (stranger.model_info, lambda repo_id: hf_hub_download(repo_id, "README.md", token=False)):
        with pytest.raises(RepositoryNotFoundError) as refused:
            act("me/facts")
        assert refused.value.response.status_code == 401
    for api, repo_id, code in ((stranger, "me/open", 401), (mistaken, "me/open", 401), (HfApi(), "you/open", 403)):
        with pytest.raises(HfHubHTTPError) as refused:
            api.create_commit(repo_id, add(y_json=b"1"), commit_message="m")
        assert refused.value.response.status_code == code
        assert hub.head(repo_id).parent is None
    for api, code in ((stranger, 401), (mistaken, 401)):
        with pytest.raises(HfHubHTTPError) as refused:
            api.create_repo("me/new")
        assert refused.value.response.status_code == code


def test_visibility_changes_and_repositories_go(hub: HubServer, pushed: str) -> None:
    api = HfApi()
    api.update_repo_settings("me/facts", private=False)
    assert api.model_info("me/facts").private is False
    api.delete_repo("me/facts")
    assert not api.repo_exists("me/facts")


def test_a_branch_has_a_head_of_its_own(hub: HubServer, pushed: str) -> None:
    api = HfApi()
    api.create_branch("me/facts", branch="try/1")
    api.create_commit("me/facts", add(y_json=b"1"), commit_message="m", revision="try/1")
    assert "y.json" in hub.files("me/facts", "try/1") and hub.head("me/facts").id == pushed
    assert Path(hf_hub_download("me/facts", "y.json", revision="try/1")).read_bytes() == b"1"


def test_long_listings_come_in_pages(hub: HubServer, pushed: str) -> None:
    hub.page_size = 2
    assert HfApi().list_repo_files("me/facts") == [".gitattributes", "README.md", "a.safetensors", "sub/b.json"]
    assert len(list(HfApi().list_repo_tree("me/facts", "sub"))) == 1


def test_a_card_with_broken_metadata_is_refused_before_anything_is_uploaded(hub: HubServer, pushed: str) -> None:
    for card in (b"---\nlicense: mit\n", b"---\nbase_model: /home/me/model\n---\n"):
        with pytest.raises(ValueError, match="Invalid metadata"):
            HfApi().create_commit("me/facts", add(README_md=card), commit_message="m")
    assert hub.head("me/facts").id == pushed


def test_another_process_needs_the_environment_alone(hub: HubServer, pushed: str, tmp_path: Path) -> None:
    code = "from huggingface_hub import hf_hub_download as get; print(get('me/facts', 'README.md'))"
    environment = {**os.environ, **hub.environment(str(tmp_path / "home"))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(tmp_path) and b"Hello" in Path(done.stdout.strip()).read_bytes()
