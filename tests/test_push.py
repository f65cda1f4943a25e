"""Publishing: what goes up, what does not, and who is asked before."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from loramem_cli.main import run

from loramem import MemoryStore
from loramem.errors import (
    DeletedInWeights,
    HubAccess,
    HubConflict,
    HubError,
    HubOffline,
    IntegrityError,
    KeyNotFound,
    PublicRepository,
    StoreError,
    StoreReadOnly,
)
from loramem.models.placement import Placement
from loramem.planning.samples import generate
from loramem.results import PushPlan
from loramem.training import shard_training
from loramem.training.progress import Training

from .conftest import numbers
from .hub_faults import Fault, dropped, status
from .hub_server import HubServer

RECORDS, MORE = numbers(5, digits=9), {"another key": "471147114"}
HIDDEN = "0815-0815-0815"
REPO = "me/facts"


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store on a local base model, in a namespace too; copied by each test that changes it."""
    path = tmp_path_factory.mktemp("written") / "store"
    with MemoryStore(path, str(base)) as store:
        store.write(RECORDS)
        store.write([{"key": "secret name", "value": HIDDEN, "metadata": {"source": "a drawer"}}], namespace="team/x")
    return path


@pytest.fixture
def store(written: Path, tmp_path: Path) -> MemoryStore:
    shutil.copytree(written, tmp_path / "store")
    return MemoryStore(tmp_path / "store")


def pulled(path: Path, base: Path, **given: object) -> MemoryStore:
    return MemoryStore.pull(REPO, path, str(base), **given)  # type: ignore[arg-type]


def test_a_pushed_store_is_private_and_tells_no_key_value_namespace_or_path(
    store: MemoryStore, hub: HubServer, base: Path
) -> None:
    report = store.push(REPO)

    head = hub.head(REPO)
    everything = b"\n".join(hub.files(REPO).values()) + repr(sorted(hub.files(REPO))).encode()
    assert (report.commit, report.records, report.changed) == (head.id, 6, True)
    assert hub.repositories[REPO].private
    for told in (*RECORDS, *RECORDS.values(), "secret name", HIDDEN, "team/x", "a drawer"):
        assert told.encode() not in everything
    for local in (base, base.parent, store.path, Path.home(), Path.cwd()):
        assert str(local).encode() not in everything


def test_the_card_names_what_it_needs_and_what_is_proved(store: MemoryStore, hub: HubServer) -> None:
    store.push(REPO, license="cc0-1.0")

    card = hub.files(REPO)["README.md"].decode()
    assert "library_name: peft" in card and "license: cc0-1.0" in card and "base_model" not in card
    for adapter in store.adapters():
        assert f"| `{adapter.id}` | {adapter.rank} |" in card
    assert "the keys: recall works for whoever knows one" in card


def test_the_code_of_the_card_recalls_with_peft_alone(
    store: MemoryStore,
    hub: HubServer,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store.push(REPO)
    for path, content in hub.files(REPO).items():
        (tmp_path / "repository" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repository" / path).write_bytes(content)
    (code,) = re.findall(r"```python\n(.*?)```", hub.files(REPO)["README.md"].decode(), flags=re.DOTALL)
    first = re.findall(r'adapter, key = "adapters/(\w+)"', code)[0]
    record = next(record for record in store.records(adapter=first))
    monkeypatch.chdir(tmp_path / "repository")
    exec(code.replace(f'"{base.name}"', repr(str(base))).replace("your key", record.key), {})
    assert capsys.readouterr().out.strip() == record.value


def test_without_keys_recall_works_by_key_given_and_the_store_can_only_be_read(
    store: MemoryStore, hub: HubServer, base: Path, tmp_path: Path
) -> None:
    store.push(REPO)

    with pulled(tmp_path / "there", base) as there:
        assert {key: there.recall(key) for key in RECORDS} == RECORDS
        assert there.recall("secret name", "team/x") == HIDDEN
        assert [recall.value for recall in there.recall_many(RECORDS)]
        with pytest.raises(KeyNotFound):
            there.recall("secret name")
        with pytest.raises(KeyNotFound):
            there.recall("key 99")
        with pytest.raises(StoreReadOnly, match="without its keys"):
            there.write(MORE)
        assert there.verify().ok and there.verify().exact is None


def test_with_keys_the_store_goes_on_elsewhere_and_values_stay_behind_unless_asked(
    store: MemoryStore, hub: HubServer, base: Path, tmp_path: Path
) -> None:
    store.push(REPO, include_keys=True)
    with pulled(tmp_path / "there", base) as there:
        assert sorted(there.keys()) == sorted(RECORDS) and not there.manifest.keep_values
        assert there.write(MORE).written == 1
        commit = there.push(REPO, include_keys=True).commit
    assert hub.head(REPO).id == commit

    with pytest.raises(HubConflict, match="Pull it into a new folder"):
        store.push(REPO, include_keys=True)
    assert hub.head(REPO).id == commit

    store.push("me/all", include_keys=True, include_values=True)
    with MemoryStore.pull("me/all", tmp_path / "all", str(base)) as there:
        assert {record.value for record in there.records(None)} == {*RECORDS.values(), HIDDEN}
        assert [record.metadata for record in there.records("team/x")] == [{"source": "a drawer"}]


def test_only_new_adapters_are_uploaded_and_ended_ones_go(store: MemoryStore, hub: HubServer) -> None:
    store.push(REPO)
    before = set(hub.files(REPO))
    hub.requests.clear()

    (new,) = store.write(MORE).adapters
    report = store.push(REPO)

    assert report.uploaded == (new,) and report.removed == ()
    puts = [request.path for request in hub.requests if request.method == "PUT"]
    assert len(puts) == 1  # one file of weights
    assert {path.split("/")[1] for path in hub.head(REPO).added if path.startswith("adapters/")} == {new}
    assert not store.push(REPO).changed and hub.head(REPO).id == report.commit

    store.delete("another key")
    assert store.push(REPO).removed == (new,)
    assert set(hub.files(REPO)) == before


def test_a_stale_parent_is_refused_and_nothing_changes(store: MemoryStore, hub: HubServer) -> None:
    store.push(REPO)
    other = hub.commit(REPO, {"README.md": b"by somebody else"})
    store.write(MORE)
    with pytest.raises(HubConflict) as caught:
        store.push(REPO)
    assert caught.value.got == other and hub.head(REPO).id == other

    assert store.push(REPO, replace=True).changed


def test_somebody_who_commits_while_a_push_is_under_way_is_not_overwritten(store: MemoryStore, hub: HubServer) -> None:
    store.push(REPO)
    store.write(MORE)
    before = {path: content for path, content in hub.files(REPO).items() if path != "LICENSE"}
    with pytest.raises(HubConflict, match="while this push was under way"):
        store.push(REPO, confirm=lambda _: hub.commit(REPO, {"LICENSE": b"of somebody else"}) and None)
    assert hub.files(REPO) == {**before, "LICENSE": b"of somebody else"}
    with pytest.raises(HubConflict, match="Pull it into a new folder"):
        store.push(REPO)


def test_a_push_that_lost_its_answer_goes_on(store: MemoryStore, hub: HubServer) -> None:
    hub.fault(dropped(performed=True), "POST", "/commit/", times=10)
    with pytest.raises(HubError):
        store.push(REPO)
    hub.clear_faults()
    assert not store.push(REPO).changed  # what was sent is what is there


def test_a_public_repository_is_refused_unless_asked_for(store: MemoryStore, hub: HubServer) -> None:
    hub.create(REPO, private=False)
    head = hub.head(REPO).id
    with pytest.raises(PublicRepository, match="6 records"):
        store.push(REPO)
    assert hub.head(REPO).id == head
    assert store.push(REPO, public=True).changed
    store.push("me/open", public=True)
    assert not hub.repositories["me/open"].private


def test_a_repository_with_other_content_is_not_taken_over(store: MemoryStore, hub: HubServer) -> None:
    hub.create(REPO, private=True)
    hub.commit(REPO, {"model.safetensors": b"somebody's own"})
    with pytest.raises(HubConflict, match="nothing to do with"):
        store.push(REPO)


def test_who_is_asked_sees_the_plan_before_anything_is_sent(store: MemoryStore, hub: HubServer) -> None:
    plans: list[PushPlan] = []

    class DeclinedError(Exception):
        pass

    def decline(plan: PushPlan) -> None:
        plans.append(plan)
        raise DeclinedError

    with pytest.raises(DeclinedError):
        store.push(REPO, include_keys=True, confirm=decline)
    assert (plans[0].records, plans[0].adapters, len(plans[0].uploaded)) == (6, 2, 2)
    assert plans[0].private and plans[0].keys and not plans[0].values
    assert REPO not in hub.repositories


def test_deleted_and_replaced_records_that_adapters_still_hold_are_not_published(
    store: MemoryStore, hub: HubServer
) -> None:
    store.delete("key 0")
    with pytest.raises(DeletedInWeights, match="compact --dead") as caught:
        store.push(REPO)
    assert caught.value.records == 1 and REPO not in hub.repositories
    store.compact(which="dead")
    assert store.push(REPO).records == 5


def test_a_folder_whose_name_is_no_id_of_the_hub_is_published_by_it(
    written: Path, hub: HubServer, base: Path, tmp_path: Path
) -> None:
    for name, published in {"my model (v2)": True, "odd;name": False}.items():
        shutil.copytree(base, tmp_path / name)
        with MemoryStore(tmp_path / f"store {name}", str(tmp_path / name)) as store:
            store.write(MORE)
            if published:
                store.push(REPO)
                assert (
                    MemoryStore.pull(REPO, tmp_path / "there", str(tmp_path / name)).recall("another key")
                    == MORE["another key"]
                )
            else:
                with pytest.raises(StoreError, match="cannot be published as it is: id"):
                    store.push("me/other")


def test_values_that_a_store_does_not_keep_are_refused_in_one_line(
    hub: HubServer, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with MemoryStore(tmp_path / "store", str(base), keep_values=False) as store:
        store.write(MORE)
    arguments = ["push", REPO, "--store", str(tmp_path / "store"), "--yes", "--include-keys", "--include-values"]
    assert run(arguments) == 1
    shown = capsys.readouterr().err
    assert "keeps digests of its values alone" in shown and shown.count("\n") == 1


def test_a_card_that_the_hub_does_not_take_is_said_with_its_reason(store: MemoryStore, hub: HubServer) -> None:
    refusal = json.dumps({"errors": [{"message": "license must be one of many"}], "warnings": []}).encode()
    hub.fault(Fault(lambda answer: replace(answer, status=400, body=refusal)), "POST", "/validate-yaml")
    with pytest.raises(HubError, match="license must be one of many"):
        store.push(REPO, license="none that there is")


def test_damage_is_not_published(store: MemoryStore, hub: HubServer) -> None:
    weights = next(store.path.glob("adapters/*/adapter_model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError):
        store.push(REPO)
    assert REPO not in hub.repositories


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"repo": "no such/name/at all"}, HubError, "not the name of a repository"),
        ({"repo": "somebody/else"}, HubAccess, "token"),
        ({"include_values": True}, ValueError, "with their keys"),
    ],
)
def test_what_cannot_be_pushed_is_said_in_one_line(
    given: dict[str, object], error: type[Exception], said: str, store: MemoryStore, hub: HubServer
) -> None:
    with pytest.raises(error, match=said) as caught:
        store.push(**{"repo": REPO, **given})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_without_a_token_or_online_nothing_goes(
    store: MemoryStore, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    with pytest.raises(HubAccess, match="hf auth login"):
        store.push(REPO)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    with pytest.raises(HubOffline, match="HF_HUB_OFFLINE"):
        store.push(REPO)
    assert not hub.requests


def test_a_hub_that_fails_for_a_moment_is_asked_again(store: MemoryStore, hub: HubServer) -> None:
    hub.fault(status(503), "POST", "/info/lfs/objects/batch")
    assert store.push(REPO).changed


def test_the_command_asks_and_says_what_becomes_extractable(
    written: Path, tmp_path: Path, hub: HubServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(written, tmp_path / "store")
    monkeypatch.setattr("click.confirm", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(["push", REPO, "--store", str(tmp_path / "store")]) == 130
    assert "6 records become extractable by those who may read it" in capsys.readouterr().err
    assert REPO not in hub.repositories

    assert run(["push", REPO, "--store", str(tmp_path / "store"), "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["commit"] == hub.head(REPO).id
    hub.commit(REPO, {"README.md": b"by somebody else"})
    assert run(["push", REPO, "--store", str(tmp_path / "store"), "--yes"]) == 13
    assert run(["push", REPO, "--store", str(tmp_path / "store"), "--include-values"]) == 2


def test_a_new_process_with_an_empty_cache_recalls_everything(hub: HubServer, tmp_path: Path) -> None:
    """On the embedded base model; the second push, after new records, uploads only their adapter."""
    records = generate("phonebook", 6)
    with MemoryStore(tmp_path / "here") as store:
        for some in (records[:3], records[3:]):
            (adapter,) = store.write(some).adapters
            assert store.push(REPO, include_keys=True).uploaded == (adapter,)
    assert [path for path in hub.head(REPO).added if path.endswith(".safetensors")] == [
        f"adapters/{adapter}/adapter_model.safetensors"
    ]

    home, there = str(tmp_path / "home"), str(tmp_path / "there")
    environment = {**os.environ, **hub.environment(home), "XDG_CACHE_HOME": home}
    for arguments in (["pull", REPO], ["recall", "--all", "--json"]):
        command = [sys.executable, "-m", "loramem_cli", *arguments, "--store", there]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {entry["key"]: entry["value"] for entry in found} == {record.key: record.value for record in records}


@pytest.mark.parametrize("bug", [ValueError("ours"), OSError(5, "ours")], ids=repr)
@pytest.mark.parametrize("where", ["_adapters", "_check_parent", "commit_publication"])
def test_a_bug_of_ours_is_not_taken_for_the_hubs(
    where: str, bug: Exception, store: MemoryStore, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.create(REPO, private=True)

    def broken(*_: object) -> None:
        raise bug

    monkeypatch.setattr(f"loramem.hub.push.{where}", broken)
    with pytest.raises(type(bug)) as caught:
        store.push(REPO)
    assert caught.value is bug


def test_a_file_that_cannot_be_read_while_it_is_uploaded_is_said_as_that(
    store: MemoryStore, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "adapter_model.safetensors")

    monkeypatch.setattr("huggingface_hub._commit_api.lfs_upload", unreadable)
    with pytest.raises(PermissionError, match=r"Permission denied: 'adapter_model\.safetensors'"):
        store.push(REPO)


def test_an_adapter_that_climbed_says_where_it_sits(
    base: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = shard_training.train_on_features

    def fails_at_first(*arguments: object, **named: object) -> Training:
        training = train(*arguments, **named)  # type: ignore[arg-type]
        placement = arguments[5]
        assert isinstance(placement, Placement)
        return replace(training, stubborn=(0,)) if len(placement.modules) == 1 else training

    monkeypatch.setattr(shard_training, "train_on_features", fails_at_first)
    with MemoryStore(tmp_path / "climbed", str(base)) as store:
        store.write({"a key": "17"})
        assert store.manifest.placement["modules"] == ["down_proj"]
        assert store.adapters()[0].placement["modules"] == ["down_proj", "gate_proj", "up_proj"]
        store.push(REPO, include_keys=True)
    with pulled(tmp_path / "there", base) as there:
        assert there.adapters()[0].placement["modules"] == ["down_proj", "gate_proj", "up_proj"]
        assert there.recall("a key") == "17"
