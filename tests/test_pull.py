"""Pulling: nothing of a repository that breaks a rule becomes a store."""

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loramem_cli.main import run
from safetensors.numpy import load, save

from loramem import MemoryStore
from loramem.errors import (
    BaseModelNotFound,
    HubAccess,
    HubError,
    LoramemError,
    NotAPublication,
    OtherBaseModel,
    RefusedRepository,
)
from loramem.hub.publication import read_publication
from loramem.index.rows import digest_of
from loramem.models.adapters import adapter_id_of
from loramem.models.fingerprint import fingerprint, former_digests

from .conftest import numbers
from .hub_faults import header, other_bytes, rewritten, slow, status, truncated
from .hub_server import HubServer

Files = dict[str, bytes]
REPO, RECORDS = "me/facts", numbers(4)


@pytest.fixture(scope="module")
def store(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemoryStore]:
    with MemoryStore(tmp_path_factory.mktemp("published") / "store", str(base)) as store:
        store.write(RECORDS)
        yield store


@pytest.fixture
def files(store: MemoryStore, hub: HubServer) -> Files:
    """What an honest push leaves in a repository, keys and values included."""
    store.push("me/honest", include_keys=True, include_values=True, replace=True)
    return {path: content for path, content in hub.files("me/honest").items() if path != ".gitattributes"}


def weights_of(files: Files) -> str:
    return next(path for path in files if path.endswith(".safetensors"))


def config_of(files: Files) -> str:
    return next(path for path in files if path.endswith("adapter_config.json"))


def described(files: Files, change: Callable[[dict[str, Any]], None]) -> None:
    """Change loramem.json."""
    fields = json.loads(files["loramem.json"])
    change(fields)
    files["loramem.json"] = json.dumps(fields).encode()


def lines(files: Files, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Change records.jsonl, and its sha256 in loramem.json."""
    found = [json.loads(line) for line in files["records.jsonl"].splitlines()]
    change(found)
    files["records.jsonl"] = "".join(json.dumps(line) + "\n" for line in found).encode()
    described(files, lambda fields: fields.update(records_sha256=hashlib.sha256(files["records.jsonl"]).hexdigest()))


def adapter_file(files: Files, path: str, content: bytes) -> None:
    """Replace a file of the adapter, and what loramem.json says of it: a forger would."""
    files[path] = content
    name = path.rpartition("/")[2]
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    described(files, lambda fields: fields["adapters"][0]["files"].update({name: entry}))
    adapter = json.loads(files["loramem.json"])["adapters"][0]
    hashes = (adapter["files"][file]["sha256"] for file in ("adapter_model.safetensors", "adapter_config.json"))
    rename(files, adapter_id_of(*hashes, adapter["namespace"]))


def rename(files: Files, new: str) -> None:
    """Give the adapter another id, everywhere."""
    old = json.loads(files["loramem.json"])["adapters"][0]["id"]
    for path in list(files):
        files[path.replace(old, new)] = files.pop(path)
    described(files, lambda fields: fields["adapters"][0].update(id=new))
    lines(files, lambda records: [record.update(adapter=new) for record in records])


def forged(files: Files, **fields: Any) -> None:
    """Change a record, and the digest of its value with it."""

    def change(records: list[dict[str, Any]]) -> None:
        record = records[0]
        record.update(fields)
        record["digest"] = digest_of(record["salt"], record["namespace"], record["key"], record["value"])

    lines(files, change)


def trained(files: Files, **fields: Any) -> None:
    described(files, lambda found: found["adapters"][0]["training"].update(fields))


def tensors(files: Files, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    found = load(files[weights_of(files)])
    change(found)
    adapter_file(files, weights_of(files), save(found, metadata={"format": "pt"}))


def config(files: Files, **fields: Any) -> None:
    changed = {**json.loads(files[config_of(files)]), **fields}
    adapter_file(files, config_of(files), json.dumps(changed).encode())


def first(found: dict[str, np.ndarray]) -> str:
    return min(found)


def with_value(array: np.ndarray, value: float) -> np.ndarray:
    changed = array.copy()
    changed.flat[0] = value
    return changed


HOSTILE: dict[str, Callable[[Files], object]] = {
    # loramem.json
    "description is not JSON": lambda f: f.update({"loramem.json": b"{"}),
    "description is a list": lambda f: f.update({"loramem.json": b"[]"}),
    "description nests too deep": lambda f: f.update({"loramem.json": b'{"format":' + b"[" * 100_000}),
    "a newer format": lambda f: described(f, lambda d: d.update(format=2)),
    "an unknown field": lambda f: described(f, lambda d: d.update(run="curl | sh")),
    "a missing field": lambda f: described(f, lambda d: d.pop("prompt")),
    "a number as text": lambda f: described(f, lambda d: d.update(records="4")),
    "a path as base model": lambda f: described(f, lambda d: d["base_model"].update(id="../../etc")),
    "an address as base model": lambda f: described(f, lambda d: d["base_model"].update(id="https://evil.example/x")),
    "an adapter id that is a path": lambda f: described(f, lambda d: d["adapters"][0].update(id="../../../etc/x")),
    "an adapter twice": lambda f: described(f, lambda d: d["adapters"].append(d["adapters"][0])),
    "an unknown adapter file": lambda f: described(
        f, lambda d: d["adapters"][0]["files"].update({"x.py": d["adapters"][0]["files"]["README.md"]})
    ),
    "a rank beyond reason": lambda f: described(f, lambda d: d["adapters"][0].update(rank=10**9)),
    "a certificate above 1": lambda f: described(f, lambda d: d["adapters"][0].update(min_prob=1.5)),
    "another number of records": lambda f: described(f, lambda d: d["adapters"][0].update(records=3)),
    "values without keys": lambda f: described(f, lambda d: d.update(key_salt="0" * 64)),
    "half a fingerprint": lambda f: described(f, lambda d: d["base_model"]["fingerprint"].pop("tensors")),
    "a fingerprint of something else": lambda f: described(
        f, lambda d: d["base_model"]["fingerprint"].update(shoe="0" * 64)
    ),
    "a revision that climbs": lambda f: described(f, lambda d: d["base_model"].update(revision="../../x")),
    "a threshold that certifies nothing": lambda f: described(f, lambda d: d.update(certify_threshold=0.01)),
    "a date for the terminal": lambda f: described(f, lambda d: d["adapters"][0].update(created_at="\x1b[2J")),
    "a field with a line feed": lambda f: described(f, lambda d: d.update({"a\nError: \x1b[2J": 1})),
    "a cost that is text": lambda f: trained(f, cost_bits="0"),
    "a goal that there is not": lambda f: trained(f, request={"goal": "other", "rank": None}),
    "a setting that there is not": lambda f: trained(f, settings={"run": None}),
    "a setting that is text": lambda f: trained(f, settings={"max_rank": "8"}),
    "settings that contradict each other": lambda f: trained(f, settings={"certify_threshold": 0.1}),
    "a proof of other records": lambda f: described(f, lambda d: d["adapters"][0]["proof"].update(records=5)),
    "a certificate that no record has": lambda f: described(f, lambda d: d["adapters"][0].update(min_prob=0.9999)),
    # records.jsonl
    "records of another sha256": lambda f: f.update({"records.jsonl": f["records.jsonl"] + b"\n"}),
    "a record too few": lambda f: lines(f, lambda r: r.pop()),
    "a key twice": lambda f: lines(f, lambda r: r[0].update(key=r[1]["key"])),
    "two keys with one prompt": lambda f: lines(f, lambda r: r[0].update(prompt_sha256=r[1]["prompt_sha256"])),
    "an empty key": lambda f: lines(f, lambda r: r[0].update(key="")),
    "a record of no adapter": lambda f: lines(f, lambda r: r[0].update(adapter="0" * 32)),
    "a record in another namespace": lambda f: lines(f, lambda r: r[0].update(namespace="elsewhere")),
    "a value with another digest": lambda f: lines(f, lambda r: r[0].update(value="0000")),
    "a value that is not there": lambda f: lines(f, lambda r: r[0].pop("value")),
    "more answer tokens than any context": lambda f: lines(f, lambda r: r[0].update(answer_tokens=2**40)),
    # the adapter's files
    "weights of another sha256": lambda f: f.update({weights_of(f): f[weights_of(f)][:-1] + b"\0"}),
    "weights of another size": lambda f: f.update({weights_of(f): f[weights_of(f)] + b"\0"}),
    "weights that are a pickle": lambda f: adapter_file(f, weights_of(f), b"\x80\x04cposix\nsystem\n."),
    "a header longer than the file": lambda f: adapter_file(f, weights_of(f), (2**62).to_bytes(8, "little") + b"{}"),
    "a tensor too many": lambda f: tensors(f, lambda t: t.update(extra=np.zeros(1, np.float32))),
    "a tensor of another module": lambda f: tensors(
        f, lambda t: t.update({first(t).replace("lora_A", "lora_C"): np.zeros((1, 1), np.float32)})
    ),
    "a tensor too few": lambda f: tensors(f, lambda t: t.pop(first(t))),
    "a tensor of another rank": lambda f: tensors(f, lambda t: t.update({first(t): t[first(t)][:-1]})),
    "a tensor of another dtype": lambda f: tensors(f, lambda t: t.update({first(t): t[first(t)].astype(np.float64)})),
    "NaN": lambda f: tensors(f, lambda t: t.update({first(t): with_value(t[first(t)], math.nan)})),
    "Inf": lambda f: tensors(f, lambda t: t.update({first(t): with_value(t[first(t)], math.inf)})),
    "a tensor name that takes for ever": lambda f: tensors(
        f, lambda t: t.update({f"base_model.model.{'1.' * 100_000}x": np.zeros((1, 1), np.float32)})
    ),
    "another id than that of its content": lambda f: rename(f, "0" * 32),
    "a config of two megabytes": lambda f: adapter_file(f, config_of(f), f[config_of(f)] + b" " * 2**21),
    "a config that is no object": lambda f: adapter_file(f, config_of(f), b"[1]"),
    "a config with code": lambda f: config(f, auto_mapping={"base_model_class": "os.system"}),
    "a config with DoRA": lambda f: config(f, use_dora=True),
    "a config with another scaling": lambda f: config(f, lora_alpha=10**6),
    "a config that saves more modules": lambda f: config(f, modules_to_save=["lm_head"]),
    "a config with another base": lambda f: config(f, base_model_name_or_path="/etc"),
    "a config with another type": lambda f: config(f, inference_mode=1),
    # the repository
    "a file missing": lambda f: f.pop(config_of(f)),
    "a file too many": lambda f: f.update({f"adapters/{'0' * 32}/adapter_model.safetensors": b""}),
    "a pickle among the adapters": lambda f: f.update({weights_of(f).replace(".safetensors", ".bin"): b"\x80\x04."}),
    "a name that climbs": lambda f: f.update({"../escaped.txt": b"x"}),
    "a name from the root": lambda f: f.update({"/tmp/escaped.txt": b"x"}),
    "a name with a backslash": lambda f: f.update({"adapters\\..\\escaped.txt": b"x"}),
    "a name with a line feed": lambda f: f.update({"a\nb": b"x"}),
    "a name that is written backwards": lambda f: f.update({"a\u202eb": b"x"}),
}
ON_THE_BASE: dict[str, Callable[[Files], object]] = {
    "a shape that the base does not imply": lambda f: tensors(f, _swap_shapes),
    "weights that do not give the values back": lambda f: tensors(f, lambda t: [a.fill(0) for a in _writable(t)]),
    "a key longer than the context": lambda f: forged(f, key="x" * 200_000),
    "a key of another prompt": lambda f: forged(f, key="another key"),
    "another prompt": lambda f: described(f, lambda d: d["prompt"]["suffix_ids"].append(7)),
}


def _writable(found: dict[str, np.ndarray]) -> list[np.ndarray]:
    found.update({name: array.copy() for name, array in found.items()})
    return list(found.values())


def _swap_shapes(found: dict[str, np.ndarray]) -> None:
    """An input less and an output more of one module: the number of parameters stays."""
    inputs = first(found)
    outputs = inputs.replace("lora_A", "lora_B")
    found[outputs] = np.concatenate([found[outputs], np.zeros((1, len(found[inputs])), np.float32)])
    found[inputs] = np.ascontiguousarray(found[inputs][:, :-1])


def refused(
    hub: HubServer, files: Files, folder: Path, kind: type[LoramemError] = RefusedRepository, **given: Any
) -> LoramemError:
    """The error of pulling these files, after which the folder is as it was."""
    folder.mkdir()
    (folder / "mine.txt").write_text("kept")
    hub.create(REPO, private=True)
    hub.commit(REPO, files)
    with pytest.raises(kind) as caught:
        MemoryStore.pull(REPO, folder / "store", **{"verify": False, **given})
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500
    return caught.value


@pytest.mark.parametrize("rule", HOSTILE)
def test_a_repository_that_breaks_a_rule_leaves_nothing(
    rule: str, files: Files, hub: HubServer, tmp_path: Path
) -> None:
    HOSTILE[rule](files)
    refused(hub, files, tmp_path / "folder")


@pytest.mark.parametrize("rule", ON_THE_BASE)
def test_what_only_the_base_model_can_tell_is_refused_too(
    rule: str, files: Files, hub: HubServer, base: Path, tmp_path: Path
) -> None:
    ON_THE_BASE[rule](files)
    refused(hub, files, tmp_path / "folder", base_model=str(base), verify=True)


@pytest.mark.parametrize(
    "broken",
    [
        {"adapter_config.json": b"{}", "adapter_model.safetensors": b""},
        {"README.md": b"# nothing"},
        {"loramem.json": b"{}"},
    ],
)
def test_a_repository_of_something_else_is_named_as_such(broken: Files, hub: HubServer, tmp_path: Path) -> None:
    error = refused(hub, broken, tmp_path / "folder", NotAPublication)
    assert ("load that with peft" in str(error)) == ("adapter_config.json" in broken)


def test_an_honest_repository_passes_all_of_this(files: Files, hub: HubServer, base: Path, tmp_path: Path) -> None:
    """So that what is refused above is refused for the rule it breaks."""
    hub.create(REPO, private=True)
    hub.commit(REPO, {**files, "LICENSE": b"CC0", "images/plot.png": b"not downloaded"})
    hub.requests.clear()
    with MemoryStore.pull(REPO, tmp_path / "there", str(base)) as there:
        assert {recall.key: recall.value for recall in there.recall_many()} == RECORDS
        assert there.verify().ok
    assert not [request for request in hub.requests if "plot.png" in request.path]
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "there").rglob("*") if path.is_file()}
    assert modes == {0o600}
    assert read_publication(files["loramem.json"]).records == 4


def test_a_base_model_that_was_a_folder_elsewhere_is_asked_for(files: Files, hub: HubServer, tmp_path: Path) -> None:
    error = refused(hub, files, tmp_path / "folder", BaseModelNotFound, verify=True)
    assert "Give its place here with --model" in str(error)


def test_the_fingerprint_and_the_settings_of_an_older_publication_are_taken(
    files: Files, hub: HubServer, base: Path, tmp_path: Path
) -> None:
    former = {"weights": fingerprint(base).weights, **former_digests(base)}
    trained(files, settings={"max_rank": 64, "optimizer": "adamw"})  # one that is retired
    described(files, lambda fields: fields["base_model"].update(fingerprint=former))
    hub.create(REPO, private=True)
    hub.commit(REPO, files)
    with MemoryStore.pull(REPO, tmp_path / "there", base_model=str(base)) as there:
        assert there.manifest.fingerprint == former
        assert next(there._index.adapters()).training["settings"] == {"max_rank": 64}
        assert there.verify().ok


def test_another_base_model_is_refused(
    files: Files, hub: HubServer, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    refused(hub, files, tmp_path / "folder", OtherBaseModel, base_model=str(base_of("qwen3", 1)), verify=True)


def test_more_bytes_than_allowed_are_not_downloaded(files: Files, hub: HubServer, tmp_path: Path) -> None:
    error = refused(hub, files, tmp_path / "folder", max_bytes=1000)
    assert "--max-bytes" in str(error)
    assert not [
        request for request in hub.requests if request.path.endswith(".safetensors") and "/me/facts/" in request.path
    ]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (truncated(), HubError),
        (other_bytes(), RefusedRepository),
        (header("X-Long", "x" * 200_000), HubError),
        (status(404), HubError),
    ],
)
def test_what_goes_wrong_on_the_way_is_an_error_and_no_store(
    fault: Any, kind: type[LoramemError], files: Files, hub: HubServer, tmp_path: Path
) -> None:
    hub.fault(fault, "GET", r"/resolve/.*\.safetensors", times=20)
    refused(hub, files, tmp_path / "folder", kind)


def test_a_listing_that_lies_about_a_size_is_refused(files: Files, hub: HubServer, tmp_path: Path) -> None:
    def larger(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**entry, "size": entry["size"] + 1} if "size" in entry else entry for entry in entries]

    hub.fault(rewritten(larger), "GET", "/tree/")
    refused(hub, files, tmp_path / "folder")


def test_a_hub_that_fails_or_dawdles_for_a_moment_is_waited_for(
    files: Files, hub: HubServer, base: Path, tmp_path: Path
) -> None:
    hub.create(REPO, private=True)
    hub.commit(REPO, files)
    hub.fault(status(500), "GET", "/tree/")
    hub.fault(slow(0.3), "GET", "/resolve/")
    with MemoryStore.pull(REPO, tmp_path / "there", str(base), verify=False) as there:
        assert len(there) == 4


def test_a_revision_is_pinned_to_its_commit(store: MemoryStore, hub: HubServer, base: Path, tmp_path: Path) -> None:
    first = store.push(REPO, include_keys=True, replace=True).commit
    hub.commit(REPO, {"loramem.json": b"broken since"})
    with pytest.raises(RefusedRepository):
        MemoryStore.pull(REPO, tmp_path / "now", str(base), verify=False)
    with MemoryStore.pull(REPO, tmp_path / "then", str(base), revision=first, verify=False) as there:
        assert len(there) == 4
    with pytest.raises(HubAccess):
        MemoryStore.pull(REPO, tmp_path / "never", str(base), revision="0" * 40)


def test_a_private_repository_is_not_shown_to_strangers(
    files: Files, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.create(REPO, private=True)
    hub.commit(REPO, files)
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    with pytest.raises(HubAccess, match="hf auth login"):
        MemoryStore.pull(REPO, tmp_path / "there")


def test_the_command_says_in_one_line_why_not(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["pull", "me/nothing", "--store", str(tmp_path / "there")]) == 13
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "full").mkdir()
    assert run(["pull", "me/nothing", "--store", str(tmp_path / "full")]) == 1
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run(["pull", "me/nothing", "--store", str(tmp_path / "there")]) == 13
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bug", [ValueError("ours"), KeyError("ours"), OSError(5, "ours"), RuntimeError("ours")], ids=repr
)
@pytest.mark.parametrize("where", ["_check_paths", "_download_adapters"])
def test_a_bug_of_ours_is_not_taken_for_the_hubs(
    where: str, bug: Exception, files: Files, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.create(REPO, private=True)
    hub.commit(REPO, files)

    def broken(*_: object) -> None:
        raise bug

    monkeypatch.setattr(f"loramem.hub.pull.Fetched.{where}", broken)
    with pytest.raises(type(bug)) as caught:
        MemoryStore.pull(REPO, tmp_path / "there", verify=False)
    assert caught.value is bug and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "No space left on device"), (errno.EACCES, "Permission denied")]
)
def test_a_disk_that_does_not_take_a_download_is_not_the_hubs_fault(
    number: int,
    said: str,
    files: Files,
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.create(REPO, private=True)
    hub.commit(REPO, files)

    def full(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    assert run(["pull", REPO, "--store", str(tmp_path / "there")]) == 1
    shown = capsys.readouterr().err
    assert said in shown and "cannot be reached" not in shown and shown.count("\n") == 1
    assert not list(tmp_path.iterdir())
