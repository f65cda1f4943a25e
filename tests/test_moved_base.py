"""A store follows its base model: fingerprints are compared, names and folders are hints."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from loramem_cli.main import run
from transformers import AutoModelForCausalLM

from loramem import MemoryStore, base_path
from loramem.errors import BaseModelNotFound, OtherBaseModel
from loramem.models.base_model import load_base_model
from loramem.workers.worker import _adapted_model

from .conftest import numbers

OLD_STORE = Path(__file__).parent / "store-format-1"
COMMIT = "0123456789abcdef" * 2 + "01234567"
RECORDS = numbers(2)


def in_cache(folder: Path, parent: Path) -> Path:
    """A copy that lies as the Hub's client keeps the commit of a repository."""
    return Path(shutil.copytree(folder, parent / "models--some-org--a-model" / "snapshots" / COMMIT))


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store and the base model it was written with."""
    folder = tmp_path_factory.mktemp("written")
    shutil.copytree(base, folder / "moved_a")
    with MemoryStore(folder / "memory", str(folder / "moved_a")) as store:
        store.write(RECORDS)
    return folder


@pytest.fixture
def moved(written: Path, base: Path, tmp_path: Path) -> Path:
    """The store, made where the base model is no more, and that model under another name."""
    shutil.copytree(written / "memory", tmp_path / "memory")
    shutil.copytree(base, tmp_path / "moved_b")
    return tmp_path


@pytest.fixture
def gone(written: Path) -> Any:
    (written / "moved_a").rename(written / "aside")
    yield
    (written / "aside").rename(written / "moved_a")


def configs(store: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_bytes()) for path in store.rglob("adapter_config.json")]


def test_without_its_folder_the_store_asks_for_the_new_place(moved: Path, written: Path, gone: None, capsys) -> None:
    with MemoryStore(moved / "memory", create=False) as store:
        assert len(store) == 2  # what needs no base model works
        with pytest.raises(BaseModelNotFound, match="Give its new place with --model") as error:
            store.recall("key 0")
    assert str(written / "moved_a") in str(error.value) and "Hub" not in str(error.value)
    assert run(["recall", "key 0", "--store", str(moved / "memory")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert run(["recall", "key 0", "--store", str(moved / "memory"), "--model", str(moved / "moved_b")]) == 0
    assert capsys.readouterr().out.strip() == RECORDS["key 0"]


def test_given_the_new_place_everything_works_under_the_old_name(moved: Path, gone: None) -> None:
    with MemoryStore(moved / "memory", str(moved / "moved_b"), create=False) as store:
        before = [adapter.id for adapter in store.adapters()]
        assert store.recall("key 0") == RECORDS["key 0"]
        assert store.base.id == "moved_a"
        assert store.compact(which="all").records == 2
        assert [adapter.id for adapter in store.adapters()] == before  # byte for byte
        store.write({"one more": "1"})
        assert store.verify().ok
        store.deploy("peft", moved / "served")
        assert {config["base_model_name_or_path"] for config in configs(moved)} == {"moved_a"}
        assert len(configs(moved / "served")) == 2


def test_workers_find_the_new_place_and_save_under_the_old_name(moved: Path, gone: None) -> None:
    _adapted_model.cache_clear()
    with (
        MemoryStore(moved / "memory", str(moved / "moved_b"), create=False) as store,
        ThreadPoolExecutor(1) as pool,
    ):
        store.write({"one more": "1"}, executor=pool)
        assert store.recall("one more") == "1"
    _adapted_model.cache_clear()
    assert {config["base_model_name_or_path"] for config in configs(moved)} == {"moved_a"}


def test_a_copy_in_the_hub_s_cache_is_the_same_model(moved: Path, base: Path) -> None:
    with MemoryStore(moved / "memory", str(in_cache(base, moved)), create=False) as store:
        assert (store.base.id, store.base.revision) == ("moved_a", None)
        assert store.recall("key 1") == RECORDS["key 1"]


def test_a_folder_of_the_hub_s_cache_is_known_by_the_repository(base: Path, tmp_path: Path) -> None:
    snapshot = in_cache(base, tmp_path)
    with MemoryStore(tmp_path / "memory", str(snapshot)) as store:
        assert (store.manifest.base_model, store.manifest.revision) == ("some-org/a-model", COMMIT)
        assert store.manifest.location == str(snapshot)
        store.write({"a": "1"})
        assert not any("base" in str(finding) for finding in store.check(["vllm"]).findings if finding.refused)
    (config,) = configs(tmp_path / "memory")
    assert (config["base_model_name_or_path"], config["revision"]) == ("some-org/a-model", COMMIT)
    with MemoryStore(tmp_path / "memory", str(base), create=False) as store:
        assert store.recall("a") == "1"
        assert (store.base.id, store.base.revision) == ("some-org/a-model", COMMIT)


def test_a_store_of_before_opens_with_a_copy_of_its_base_model(tmp_path: Path) -> None:
    shutil.copytree(OLD_STORE, tmp_path / "memory")
    shutil.copytree(base_path(), tmp_path / "tiny")
    with MemoryStore(tmp_path / "memory", str(tmp_path / "tiny"), create=False) as store:
        assert list(store.recall_many())
        assert store.base.id == "loramem-tiny"
        assert store.verify().ok


def test_an_export_asks_for_the_base_model_where_it_is_imported(written: Path, base: Path, tmp_path: Path) -> None:
    with MemoryStore(written / "memory", create=False) as store:
        store.export(tmp_path / "bundle")
    MemoryStore.import_bundle(tmp_path / "bundle", tmp_path / "memory").close()
    with MemoryStore(tmp_path / "memory", create=False) as store, pytest.raises(BaseModelNotFound) as error:
        store.recall("key 0")
    assert "'moved_a'" in str(error.value) and "with --model" in str(error.value) and "Hub" not in str(error.value)
    with MemoryStore(tmp_path / "memory", str(base), create=False) as store:
        assert store.recall("key 0") == RECORDS["key 0"]


def test_another_model_is_refused_with_the_parts_that_differ(moved: Path, base_of: Callable[..., Path], capsys) -> None:
    other = str(base_of("llama", 1))
    capsys.readouterr()
    assert run(["recall", "key 0", "--store", str(moved / "memory"), "--model", other]) == 12
    (line,) = capsys.readouterr().err.splitlines()
    assert "weights" in line and "configuration" in line and "tokenizer" not in line
    other = str(base_of("qwen3", 1))
    with MemoryStore(moved / "memory", other, create=False) as store, pytest.raises(OtherBaseModel) as error:
        store.recall("key 0")
    assert "weights" in str(error.value) and "configuration" not in str(error.value)
    assert error.value.expected == store.manifest.fingerprint["tensors"] != error.value.got


# Parameters as loaded


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader that changes one tensor and says nothing."""
    load = AutoModelForCausalLM.from_pretrained

    def noisily(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        with torch.no_grad():
            model.model.layers[1].self_attn.v_proj.weight.add_(1e-3)
        return loaded

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", noisily)


def test_a_loader_that_changes_a_tensor_is_found_out(written: Path, base: Path, noisy: None) -> None:
    with MemoryStore(written / "memory", str(base), create=False) as store:
        with pytest.raises(OtherBaseModel, match="parameters as loaded") as error:
            store.recall("key 0")
        assert "weights (" not in str(error.value) and "transformers" in str(error.value)
        assert error.value.expected == store.manifest.fingerprint["parameters"]


def test_a_loader_that_changes_a_tensor_is_found_out_by_workers(
    written: Path, base: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    _adapted_model.cache_clear()
    shutil.copytree(written / "memory", tmp_path / "memory")
    with MemoryStore(tmp_path / "memory", str(base), create=False) as store, ThreadPoolExecutor(1) as pool:
        assert store.base
        request.getfixturevalue("noisy")
        with pytest.raises(OtherBaseModel, match="parameters as loaded"):
            store.write({"one more": "1"}, executor=pool)
    _adapted_model.cache_clear()


def test_verify_finds_parameters_that_changed_in_memory_and_proofs_on_others(written: Path, base: Path) -> None:
    with MemoryStore(written / "memory", str(base), create=False) as store:
        (adapter,) = store.adapters()
        assert adapter.proof["parameters"] == store.manifest.fingerprint["parameters"]
        with torch.no_grad():
            store.base.model.model.embed_tokens.weight[300, 0] += 1e-3
        damaged = store.verify().damaged
    assert any("parameters as loaded" in problem for problem in damaged)
    assert any(f"Adapter {adapter.id} was proved on other parameters" in problem for problem in damaged)


def test_verify_reports_files_of_the_base_model_that_were_lost_or_cut(moved: Path) -> None:
    folder = moved / "moved_b"
    with MemoryStore(moved / "memory", str(folder), create=False) as store:
        assert store.base
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
        assert any("no whole safetensors file" in problem for problem in store.verify().damaged)
        (folder / "config.json").unlink()
        assert store.verify().damaged


def test_parameters_of_another_dtype_are_not_compared(written: Path, base: Path) -> None:
    with MemoryStore(written / "memory", str(base), dtype="bfloat16", create=False) as store:
        assert store.base.fingerprint.parameters != store.manifest.fingerprint["parameters"]


def test_a_model_in_several_files_is_the_same_base_model(written: Path, base: Path, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(base, tmp_path / "cut", ignore=shutil.ignore_patterns("*.safetensors")))
    load_base_model(str(base)).model.save_pretrained(cut, max_shard_size="100KB")
    assert len(list(cut.glob("*.safetensors"))) > 1
    for dtype in ("auto", "bfloat16"):
        with MemoryStore(written / "memory", str(cut), dtype=dtype, create=False) as store:
            assert store.recall("key 0") == RECORDS["key 0"]


def test_capacity_takes_a_copy_for_the_model_of_the_store(moved: Path, capsys) -> None:
    planned = []
    for arguments in ([], ["--model", str(moved / "moved_b")]):
        assert run(["capacity", "--length", "100", "--json", "--store", str(moved / "memory"), *arguments]) == 0
        planned.append({**json.loads(capsys.readouterr().out), "base_model": None})
    assert planned[0] == planned[1]
