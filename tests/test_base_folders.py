"""Folders that are no whole base model: each is refused by a typed line that names the cause, and no store is made."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from loramem_cli.main import run
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    MptConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from loramem import MemoryStore
from loramem.errors import BaseModelNotFound, OutOfMemory, UnreachableToken, UnsupportedBaseModel
from loramem.models.base_model import load_base_model
from loramem.models.placement import Placement
from loramem.models.pretrained import context_tokens
from loramem.models.trunk import Trunk
from loramem.records.prompts import encode_records
from loramem.records.record import Record

from .conftest import LAYERS, VOCABULARY, WIDTH, save_tokenizer
from .hub_server import HubServer

Tensors = dict[str, torch.Tensor]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A copy of a base model, to be damaged."""
    return Path(shutil.copytree(base, tmp_path / "tiny"))


def edit(path: Path, **fields: object) -> None:
    """Set fields of a JSON file; those set to ``...`` are removed."""
    content = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def retensor(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text.strip()
    assert "\n" not in text
    return text


def refused(folder: Path, kind: type[Exception], *words: str) -> None:
    with pytest.raises(kind) as caught:
        load_base_model(str(folder))
    assert type(caught.value) is kind
    text = one_line(caught.value)
    assert all(word in text for word in words), text


# Weights that are not all there


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: without(tensors, EMBEDDING), [EMBEDDING, "drawn at random"]),
        (lambda tensors: without(tensors, HEAD), [HEAD, "tie_word_embeddings"]),
        (lambda tensors: without(tensors, "model.norm.weight"), ["model.norm.weight"]),
        (lambda tensors: prefixed(tensors, "module."), ["remove the prefix 'module.'", "more tensors"]),
        (lambda tensors: prefixed(tensors, "_orig_mod."), ["remove the prefix '_orig_mod.'"]),
        (lambda tensors: prefixed(tensors, "language_model."), ["remove the prefix 'language_model.'"]),
    ],
    ids=["embedding", "head", "norm", "module", "compiled", "cut from multimodal"],
)
def test_missing_tensors_are_named_and_not_drawn(
    folder: Path, change: Callable[[Tensors], Tensors], words: list[str]
) -> None:
    retensor(folder, change)
    refused(folder, UnsupportedBaseModel, *words)


def without(tensors: Tensors, key: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != key}


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def test_a_tied_model_with_nothing_to_tie_to_is_refused(folder: Path) -> None:
    edit(folder / "config.json", tie_word_embeddings=True)
    retensor(folder, lambda tensors: without(without(tensors, HEAD), EMBEDDING))
    refused(folder, UnsupportedBaseModel, EMBEDDING)


@pytest.mark.parametrize("kept", [EMBEDDING, HEAD])
def test_either_of_two_tied_tensors_is_enough(folder: Path, kept: str) -> None:
    edit(folder / "config.json", tie_word_embeddings=True)
    retensor(folder, lambda tensors: without(tensors, HEAD if kept == EMBEDDING else EMBEDDING))
    model = load_base_model(str(folder)).model
    expected = load_file(folder / "model.safetensors")[kept]
    assert torch.equal(model.get_input_embeddings().weight, expected)
    assert torch.equal(model.get_output_embeddings().weight, expected)


@pytest.mark.parametrize(
    "fields",
    [{"intermediate_size": 192}, {"vocab_size": VOCABULARY + 64}, {"num_key_value_heads": 4}],
    ids=["mlp", "vocabulary", "heads"],
)
def test_shapes_unlike_the_configuration_are_named(folder: Path, fields: dict[str, int]) -> None:
    edit(folder / "config.json", **fields)
    refused(folder, UnsupportedBaseModel, "shapes", "in place of", "weight")


def test_the_configuration_of_a_far_larger_model_is_refused_before_it_is_built(folder: Path) -> None:
    edit(folder / "config.json", hidden_size=65_536, intermediate_size=262_144)  # 4 · 10^11 parameters
    refused(folder, UnsupportedBaseModel, "different models")


@pytest.mark.parametrize(
    ("fields", "extra", "word"),
    [
        ({"model_type": "llama", "layer_types": ...}, {}, "self_attn.k_norm.weight"),  # norms that Llama has not
        ({"num_hidden_layers": LAYERS - 1, "layer_types": ...}, {}, "model.layers.2"),
        ({}, {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, "q_proj.bias"),
        ({}, {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}, "weight_scale"),
        ({}, {"lm_head.bias": torch.ones(VOCABULARY)}, "lm_head.bias"),
    ],
    ids=["another architecture", "fewer layers", "bias", "quantisation", "head bias"],
)
def test_tensors_left_over_in_a_part_that_the_model_has_are_refused(
    folder: Path, fields: dict[str, object], extra: Tensors, word: str
) -> None:
    edit(folder / "config.json", **fields)
    retensor(folder, lambda tensors: {**tensors, **extra})
    refused(folder, UnsupportedBaseModel, word, "does not use")


def test_parts_beside_the_language_model_and_old_buffers_are_left_alone(folder: Path) -> None:
    beside = ("vision_tower.0.weight", "mtp.layers.0.weight", "model.layers.0.self_attn.rotary_emb.inv_freq")
    masks = {
        "model.layers.0.self_attn.bias": torch.ones(1, 1, 4, 4),
        "model.layers.0.self_attn.masked_bias": torch.ones(1),
    }
    retensor(folder, lambda tensors: {**tensors, **{name: torch.ones(3) for name in beside}, **masks})
    assert load_base_model(str(folder)).max_tokens == 1024


def test_missing_weights_make_no_store(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    retensor(folder, lambda tensors: without(tensors, EMBEDDING))
    assert run(["put", "key", "7", "--store", str(tmp_path / "memory"), "--model", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Error: ")
    assert EMBEDDING in err
    assert err.count("\n") == 1
    assert not (tmp_path / "memory").exists()


# Code of a model's folder


PLANTED = "from pathlib import Path\nPath({mark!r}).touch()\n"


def plant(folder: Path, mark: Path, classes: dict[str, str]) -> None:
    (folder / "planted.py").write_text(PLANTED.format(mark=str(mark)))
    for name in ("config.json", "tokenizer_config.json"):
        edit(folder / name, auto_map=classes)


@pytest.mark.parametrize("unknown", [True, False], ids=["of its own architecture", "of a known one"])
def test_code_of_the_folder_never_runs(folder: Path, tmp_path: Path, unknown: bool) -> None:
    mark = tmp_path / "ran"
    classes = {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"}
    if unknown:
        plant(folder, mark, {**classes})
        edit(folder / "config.json", model_type="planted")
        refused(folder, UnsupportedBaseModel, "auto_map", "never runs code")
    else:
        plant(folder, mark, {**classes})
        edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["planted.Slow", "planted.Fast"]})
        assert load_base_model(str(folder)).max_tokens == 1024  # with transformers' own classes
    assert not mark.exists()


def test_nobody_is_asked_on_stdin(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mark, store, answer = tmp_path / "ran", tmp_path / "memory", io.StringIO("y\n")
    plant(folder, mark, {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"})
    edit(folder / "config.json", model_type="planted")
    monkeypatch.setattr("sys.stdin", answer)
    assert run(["put", "K", "V", "--store", str(store), "--model", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert (out, answer.tell(), err.count("\n")) == ("", 0, 1)
    assert "auto_map" in err
    assert not mark.exists()
    assert not store.exists()


@pytest.mark.parametrize("value", ["someone/kernel", {"": "sdpa", "text_config": "someone/kernel@v1"}], ids=str)
@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_that_a_configuration_names_are_not_fetched(folder: Path, field: str, value: object) -> None:
    edit(folder / "config.json", **{field: value})
    refused(folder, UnsupportedBaseModel, "someone/kernel", "never runs code")


# Files that are not what they are called


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n",
            ["git-lfs", "git lfs pull"],
        ),
        (lambda whole: b"", ["is empty"]),
        (lambda whole: whole[:4], ["safetensors", "again"]),
        (lambda whole: whole[:100], ["safetensors", "again"]),
        (lambda whole: whole[:-1], ["safetensors", "again"]),
        (lambda whole: whole[: len(whole) // 2], ["safetensors", "again"]),
    ],
    ids=["git-lfs", "empty", "4 bytes", "in the header", "one byte short", "half"],
)
def test_weights_that_are_cut_empty_or_a_pointer_are_told(
    folder: Path, content: Callable[[bytes], bytes], words: list[str]
) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(content(path.read_bytes()))
    refused(folder, BaseModelNotFound, "model.safetensors", *words)


def test_shards_that_are_not_there_are_counted(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    shards = sorted(folder.glob("model-*.safetensors"))
    assert load_base_model(str(folder)).max_tokens == 1024
    first, *_, last = shards
    content = first.read_bytes()
    first.unlink()
    refused(folder, BaseModelNotFound, f"1 of {len(shards)}", first.name)
    first.write_bytes(last.read_bytes())  # another shard in its place
    refused(folder, UnsupportedBaseModel, "drawn at random")
    first.write_bytes(content)
    edit(folder / "model.safetensors.index.json", weight_map={EMBEDDING: "../other/model.safetensors"})
    refused(folder, BaseModelNotFound, "index.json")


def test_a_pointer_in_place_of_the_tokenizer_is_told(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(folder, BaseModelNotFound, "tokenizer.json", "git lfs pull")


@pytest.mark.parametrize("tokenizer", ["TokenizersBackend", "Qwen2Tokenizer"])
def test_a_tokenizer_without_its_vocabulary_is_refused(folder: Path, tokenizer: str) -> None:
    (folder / "tokenizer.json").unlink()
    edit(folder / "tokenizer_config.json", tokenizer_class=tokenizer)
    refused(folder, BaseModelNotFound, "no vocabulary", "tokenizer.json")


def test_a_folder_beside_the_tokenizer_files_is_no_file(folder: Path) -> None:
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("a")
    assert load_base_model(str(folder)).max_tokens == 1024


def test_a_base_with_an_adapter_in_its_folder_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused(folder, UnsupportedBaseModel, "adapter_config.json", "merge")


def test_generation_settings_of_the_folder_are_not_read(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"do_sample": 7, "temperature": -1')
    assert load_base_model(str(folder)).max_tokens == 1024


@pytest.mark.parametrize(
    "template",
    [
        {"rag": "{{ messages[0]['content'] }}"},
        "{{ messages[0]['content'] + 1 }}",
        "{{ messages[0]['content'] | nonsense }}",
        "{{ messages[7]['content']['x'] }}",
        "{% for m in messages %}",
        "{{ 1 // 0 }}",
    ],
    ids=["no default", "TypeError", "filter", "undefined", "syntax", "division"],
)
def test_chat_templates_that_cannot_be_rendered_are_refused(folder: Path, template: object) -> None:
    (folder / "chat_template.jinja").unlink()
    as_saved = (
        [{"name": name, "template": text} for name, text in template.items()]
        if isinstance(template, dict)
        else template
    )
    edit(folder / "tokenizer_config.json", chat_template=as_saved)
    refused(folder, UnsupportedBaseModel, "chat template")


def test_a_tokenizer_that_drops_merges_at_random_is_refused(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.1
    (folder / "tokenizer.json").write_text(json.dumps(content))
    refused(folder, UnsupportedBaseModel, "dropout 0.1", "every time")


def test_weights_that_are_no_numbers_are_refused(folder: Path) -> None:
    retensor(folder, lambda tensors: {**tensors, "model.norm.weight": torch.full((WIDTH,), torch.nan)})
    refused(folder, UnsupportedBaseModel, "not finite")


# Context length


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(hidden_size=WIDTH, n_layer=2, n_head=4, vocab_size=VOCABULARY, eos_token_id=1, seq_length=96),
        MptConfig(d_model=WIDTH, n_layers=2, n_heads=4, vocab_size=VOCABULARY, eos_token_id=1, max_seq_len=96),
    ],
    ids=["bloom", "mpt"],
)
def test_context_lengths_by_other_names_are_found(config: PreTrainedConfig, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    assert load_base_model(str(tmp_path)).max_tokens == 96


@pytest.mark.parametrize("value", ["many", 0, -5, True, 1.5, [3]], ids=str)
def test_a_context_length_that_is_none_is_refused(value: object) -> None:
    config = BloomConfig()
    config.max_position_embeddings = value
    with pytest.raises(UnsupportedBaseModel, match="how many tokens"):
        context_tokens(config)


def test_the_tokenizers_limit_is_the_context_where_the_configuration_says_none(tmp_path: Path) -> None:
    config = BloomConfig(hidden_size=WIDTH, n_layer=2, n_head=4, vocab_size=VOCABULARY, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    refused(tmp_path, UnsupportedBaseModel, "max_position_embeddings", "model_max_length")  # the tokenizer says 10^30
    edit(tmp_path / "tokenizer_config.json", model_max_length=77)
    assert load_base_model(str(tmp_path)).max_tokens == 77


# Token ids beyond the embedding


@pytest.fixture
def short_embedding(folder: Path) -> tuple[Path, str]:
    """A base whose tokenizer has one token more than its embedding has rows; the token's text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zebra"] if len(tokenizer) == VOCABULARY else [f"w{i}" for i in range(VOCABULARY)])
    tokenizer.save_pretrained(folder)
    return folder, next(text for text, index in tokenizer.get_vocab().items() if index >= VOCABULARY)


def test_tokens_without_a_row_of_the_embedding_are_refused_with_their_record(
    short_embedding: tuple[Path, str], tmp_path: Path
) -> None:
    folder, text = short_embedding
    with MemoryStore(tmp_path / "memory", str(folder)) as store:
        for records in ({"a": text}, {text: "a"}):
            with pytest.raises(UnreachableToken, match="embedding for 512 ids") as caught:
                store.write(records)
            assert caught.value.token == text
        assert (len(store), store.pending()) == (0, None)


def test_an_end_token_without_a_row_of_the_embedding_is_refused_at_load(short_embedding: tuple[Path, str]) -> None:
    folder, text = short_embedding
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", eos_token=text)
    refused(folder, UnsupportedBaseModel, text, "512 ids")


# The Hub's cache


def publish(hub: HubServer, folder: Path, repo: str = "me/tiny") -> None:
    api = huggingface_hub.HfApi()
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=folder)


def test_only_what_is_read_is_downloaded(folder: Path, hub: HubServer) -> None:
    (folder / "consolidated.safetensors").write_bytes(b"the same weights in another layout")
    for place in ("original/params.json", "onnx/config.json", "other/model.safetensors"):
        (folder / place).parent.mkdir()
        (folder / place).write_text("{}")
    publish(hub, folder)
    base = load_base_model("me/tiny")
    found = {path.relative_to(base.folder).as_posix() for path in base.folder.rglob("*")}
    assert "model.safetensors" in found
    assert not {name for name in found if name.startswith(("consolidated", "original", "onnx", "other"))}


@pytest.mark.parametrize("listed", [True, False], ids=["what is lacking is known", "an older cache"])
def test_an_incomplete_cached_copy_is_said_to_be_one(
    folder: Path, hub: HubServer, listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, folder)
    base = load_base_model("me/tiny")
    (base.folder / "model.safetensors").unlink()
    if not listed:
        shutil.rmtree(base.folder.parent.parent / "trees")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BaseModelNotFound, match=r"cached copy of me/tiny.* is incomplete: go online once") as caught:
        load_base_model("me/tiny", revision=base.revision)
    assert str(base.revision) in one_line(caught.value)
    assert "convert" not in str(caught.value)


@pytest.mark.parametrize("name", ["~nobody-of-this-name/model", "a\0b", "no such/mo del", "x/y/z"])
def test_names_that_are_nothing_are_told(name: str) -> None:
    with pytest.raises(BaseModelNotFound) as caught:
        load_base_model(name)
    one_line(caught.value)


# Memory


EXHAUSTED = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has…"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried…"
    ),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    MemoryError(),
]


NAMES = ["cuda", "linux", "windows", "python"]


def fail(error: Exception) -> Callable[..., Any]:
    def failing(*_: object, **__: object) -> None:
        raise error

    return failing


@pytest.mark.parametrize("error", EXHAUSTED, ids=NAMES)
def test_exhausted_memory_is_told_as_such_when_a_base_model_is_loaded(
    folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedModel, "to", fail(error))
    refused(folder, OutOfMemory, "Out of memory", "smaller")


@pytest.mark.parametrize(
    ("place", "error"),
    [
        pytest.param("loramem.models.features.answer_logits", EXHAUSTED[0], id="the frozen pass"),
        *(
            pytest.param(
                "loramem.training.feature_writer.FeatureRun.train_step", error, id=f"training over features, {name}"
            )
            for name, error in zip(NAMES, EXHAUSTED, strict=True)
        ),
        pytest.param("loramem.models.trunk._tail_logits", EXHAUSTED[1], id="training through layers"),
    ],
)
def test_exhausted_memory_of_a_write_is_told_and_the_write_waits(
    base: Path, tmp_path: Path, place: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "trunk" in place:  # a store as they were made before, at the default placement
        monkeypatch.setattr(Placement, "ladder", classmethod(lambda cls, model: [cls.default(model)]))
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        with monkeypatch.context() as patched:
            patched.setattr(place, fail(error))
            with pytest.raises(OutOfMemory, match="fewer workers"):
                store.write({"a": "12"})
        if "logits" in place and "trunk" not in place:  # while it was planned: nothing is journalled yet
            assert store.pending() is None
            assert store.write({"a": "12"}).written == 1
        else:
            assert store.resume().written == 1
        with monkeypatch.context() as patched:
            patched.setattr("loramem.store.read.greedy_decode", fail(error))
            with pytest.raises(OutOfMemory):
                store.recall("a")
        assert store.recall("a") == "12"


def test_a_command_that_runs_out_of_memory_ends_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramem.models.base_model.find_base_model", fail(EXHAUSTED[0]))
    assert run(["calibrate", "--model", "loramem-tiny", "--kind", "phonebook"]) == 1
    assert capsys.readouterr().err.startswith("Error: Out of memory (CUDA out of memory.")


def test_what_fails_without_a_split_is_not_said_to_be_the_splits_fault(base: Path) -> None:
    loaded = load_base_model(str(base))
    encoded = encode_records([Record("a", "12")], loaded.tokenizer, loaded.template, loaded.max_tokens)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(loaded.model), "forward", fail(RuntimeError("a fault of the model")))
        with pytest.raises(RuntimeError, match="a fault of the model"):
            Trunk(loaded.model, encoded, LAYERS - 1)
