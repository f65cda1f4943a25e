"""What a base model is known by: what decides its answers, however and wherever it was saved."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from loramem import base_path
from loramem.errors import BaseModelNotFound, UnsupportedBaseModel
from loramem.models import fingerprint as module
from loramem.models.adapters import AdaptedModel, Placement
from loramem.models.base_model import load_base_model
from loramem.models.fingerprint import Fingerprint, fingerprint, former_digests
from loramem.models.parameters import parameters_sha256

PARTS = ("tensors", "config", "tokenizer")


def parts(folder: Path) -> tuple[str, ...]:
    found = fingerprint(folder)
    return found.tensors, found.config, found.tokenizer


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **fields}, indent=7))


def renamed_config(folder: Path) -> None:
    edit(folder / "config.json", _name_or_path="/elsewhere", transformers_version="9.9", torch_dtype="float16")


def renamed_tokenizer_config(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", name_or_path="/elsewhere", is_local=True, tokenizer_file="/x.json")


def stray_files(folder: Path) -> None:
    for name in (
        "tokenizer.json.bak",
        "tokenizer copy.json",
        "vocab.json.old",
        "old_template.jinja",
        "config.json.bak",
    ):
        (folder / name).write_text("{}")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")


def saved_again(folder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def in_several_files(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1


def second_copy_of_the_weights(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    (folder / "consolidated-2.safetensors").write_text("version https://git-lfs.github.com/spec/v1")


@pytest.mark.parametrize(
    "change",
    [
        renamed_config,
        renamed_tokenizer_config,
        stray_files,
        saved_again,
        in_several_files,
        second_copy_of_the_weights,
    ],
)
def test_what_does_not_decide_answers_does_not_change_it(
    base: Path, copy: Path, change: Callable[[Path], None]
) -> None:
    change(copy)
    assert parts(copy) == parts(base)


def other_weight(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] += 1
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda folder: edit(folder / "config.json", rms_norm_eps=1e-3), "config"),
        (lambda folder: edit(folder / "config.json", rope_parameters={"rope_theta": 1}), "config"),
        (lambda folder: edit(folder / "tokenizer_config.json", eos_token="<user>"), "tokenizer"),
        (lambda folder: (folder / "vocab.json").write_text("{}"), "tokenizer"),
        (lambda folder: (folder / "chat_template.jinja").write_text("{{ 1 }}"), "tokenizer"),
        (other_weight, "tensors"),
    ],
)
def test_what_decides_answers_changes_its_part(
    base: Path, copy: Path, change: Callable[[Path], None], part: str
) -> None:
    change(copy)
    assert [name for name, a, b in zip(PARTS, parts(base), parts(copy), strict=True) if a != b] == [part]


def test_the_former_digests_are_still_those_of_loramem_tiny() -> None:
    """As tests/store-format-1 has them; the shipped calibration is found by the weights'."""
    stored = json.loads((Path(__file__).parent / "store-format-1" / "store.json").read_bytes())["fingerprint"]
    assert {"weights": fingerprint(base_path()).weights, **former_digests(base_path())} == stored


def test_parts_that_differ_are_named() -> None:
    ours = Fingerprint("w", "t", "c", "k", "p")
    theirs = {"weights": "other", "tensors": "t", "config": "C", "tokenizer": "K", "parameters": "P"}
    assert set(ours.differences(theirs, Path(), same_dtype=True)) == {"config", "tokenizer", "parameters"}
    assert set(ours.differences(theirs, Path(), same_dtype=False)) == {"config", "tokenizer"}
    assert set(replace(ours, parameters="").differences(theirs, Path(), same_dtype=True)) == {"config", "tokenizer"}


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"])
def test_weights_that_are_no_safetensors_are_an_error_of_ours(copy: Path, content: bytes) -> None:
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(UnsupportedBaseModel, match=r"model\.safetensors is no whole safetensors file"):
        fingerprint(copy)


def test_weights_that_were_cut_are_an_error_of_ours(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UnsupportedBaseModel, match="no whole safetensors file"):
        fingerprint(copy)


def test_a_folder_without_configuration_is_an_error_of_ours(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(BaseModelNotFound, match=r"config\.json"):
        fingerprint(copy)


# The cache


@pytest.fixture
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders whose weights were hashed, in an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real, done = module._hashed, list[str]()
    monkeypatch.setattr(module, "_hashed", lambda path: done.append(path.parent.name) or real(path))
    return done


def test_weights_are_hashed_once_and_again_when_asked_or_changed(copy: Path, hashed: list[str]) -> None:
    first = fingerprint(copy)
    assert (fingerprint(copy), len(hashed)) == (first, 1)
    assert (fingerprint(copy, rehash=True), len(hashed)) == (first, 2)
    other_weight(copy)
    assert (fingerprint(copy) == first, len(hashed)) == (False, 3)


def test_what_another_process_noted_meanwhile_is_kept(
    base: Path, copy: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = module._hashed

    def meanwhile(path: Path) -> object:
        monkeypatch.setattr(module, "_hashed", slow)
        fingerprint(base)
        return slow(path)

    monkeypatch.setattr(module, "_hashed", meanwhile)
    fingerprint(copy)
    assert sorted(hashed) == sorted(["copy", base.name])
    fingerprint(copy), fingerprint(base)
    assert len(hashed) == 2


def test_weights_that_change_while_they_are_hashed_are_not_noted(
    copy: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = module._hashed

    def meanwhile(path: Path) -> object:
        found = slow(path)
        other_weight(copy)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(module, "_hashed", meanwhile)
        fingerprint(copy)
    assert not list(copy.parent.glob("cache/**/*.json"))


@pytest.mark.parametrize("content", [b"", b"[]", b'{"sha256": 1, "tensors": []}', b"\xff"])
def test_a_damaged_entry_is_made_again(copy: Path, hashed: list[str], content: bytes) -> None:
    first = fingerprint(copy)
    (entry,) = copy.parent.glob("cache/**/*.json")
    entry.write_bytes(content)
    assert (fingerprint(copy), fingerprint(copy), len(hashed)) == (first, first, 2)


def test_without_a_cache_weights_are_hashed_each_time(
    copy: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert fingerprint(copy) == fingerprint(copy)
    assert len(hashed) == 2


# Parameters as loaded


def small(tied: bool = True) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_attention_heads=2, tie_word_embeddings=tied))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_parameters_have_one_digest_and_any_bit_changes_it(dtype: torch.dtype) -> None:
    first, second = small().to(dtype), small().to(dtype)
    assert parameters_sha256(first) == parameters_sha256(second)
    norm = second.model.norm.weight
    norm.data.view(torch.uint8)[0] ^= 1
    assert parameters_sha256(first) != parameters_sha256(second)


def test_two_tensors_that_changed_places_another_shape_or_dtype_and_an_untied_head_show() -> None:
    plain = parameters_sha256(small())
    swapped = small()
    mlp = swapped.model.layers[0].mlp
    mlp.gate_proj.weight, mlp.up_proj.weight = mlp.up_proj.weight, mlp.gate_proj.weight
    reshaped = small()
    reshaped.model.norm.weight = torch.nn.Parameter(reshaped.model.norm.weight[None])
    others = {parameters_sha256(model) for model in (swapped, reshaped, small(tied=False), small().to(torch.bfloat16))}
    assert len({plain, *others}) == 5


def test_adapters_are_none_of_the_parameters(base: Path) -> None:
    loaded = load_base_model(str(base), device="cpu")
    AdaptedModel(loaded).create("unsaved", 2, Placement.default(loaded.model), 0)
    assert parameters_sha256(loaded.model) == loaded.fingerprint.parameters
