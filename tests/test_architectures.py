"""Other architectures, a model pretrained by others, and adapters loaded by PEFT alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loramem import MemoryStore, base_path
from loramem.errors import BaseModelNotFound, UnreachableToken, UnsupportedBaseModel
from loramem.models.base_model import load_base_model

from .conftest import SHARED, numbers

RECORDS = {**numbers(7), "code": "if x:\n\treturn\n", "name": "Žofie", "hex": "dead beef"}


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "mistral", "gpt_neox"])
def test_ten_records_are_written_and_recalled_with_and_without_loramem(
    architecture: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    folder = base_of(architecture)
    with MemoryStore(tmp_path / "memory", str(folder)) as store:
        report = store.write(RECORDS)
        assert report.written == 10
        assert {key: store.recall(key) for key in RECORDS} == RECORDS
        (adapter,) = report.adapters

    assert recalled_by_peft_alone(folder, tmp_path / "memory" / "adapters" / adapter, list(RECORDS)) == RECORDS


def test_the_embedded_base_is_recalled_by_peft_alone(tmp_path: Path) -> None:
    records = {**numbers(5, 10), "Ünïcode 🔑": "naïve — “quoted”"}
    with MemoryStore(tmp_path / "memory") as store:
        (adapter,) = store.write(records).adapters
    assert recalled_by_peft_alone(base_path(), tmp_path / "memory" / "adapters" / adapter, list(records)) == records


def recalled_by_peft_alone(base: Path, adapter: Path, keys: list[str]) -> dict[str, str]:
    """What transformers and PEFT decode, with nothing of loramem."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    found = {}
    for key in keys:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": key}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**prompt, max_new_tokens=60, do_sample=False)
        found[key] = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


@pytest.mark.skipif(not (SHARED / "models" / "tinystories-260k").exists(), reason="model not present")
def test_a_model_pretrained_by_others_writes_and_recalls(tmp_path: Path) -> None:
    words = "once upon a time there was little girl who liked to play with her red ball in the park".split()
    records = {f"{word} {i}": " ".join(words[-i:] + words[: 3 * i % 17]) for i, word in enumerate(words[:10], start=1)}
    with MemoryStore(tmp_path / "memory", str(SHARED / "models" / "tinystories-260k")) as store:
        assert store.manifest.prompt["kind"] == "plain"
        assert store.write(records).written == 10
        assert {key: store.recall(key) for key in records} == records
        # Its vocabulary holds bytes that its training text never did.
        with pytest.raises(UnreachableToken, match="never learned"):
            store.write({"bytes": "\x01"})
        assert len(store) == 10


def test_tokens_that_share_a_row_of_the_unembedding_are_refused(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny-twins"
    shutil.copytree(base, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seven, eight = tokenizer.convert_tokens_to_ids(["7", "8"])
    model.get_output_embeddings().weight.data[seven] = model.get_output_embeddings().weight.data[eight]
    model.save_pretrained(folder)
    assert load_base_model(str(folder)).unreachable == {seven, eight}
    with MemoryStore(tmp_path / "memory", str(folder)) as store:
        with pytest.raises(UnreachableToken) as caught:
            store.write({"a": "12", "b": "37"})
        assert (caught.value.key, caught.value.token) == ("b", "7")
        assert store.pending() is None
        assert store.write({"a": "12"}).written == 1


def test_a_base_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BaseModelNotFound, match="no-such-model"):
        MemoryStore(tmp_path / "memory", "no-such-model")
    assert not (tmp_path / "memory").exists()


def test_pickled_weights_are_never_loaded(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BaseModelNotFound, match="safetensors"):
        load_base_model(str(folder))


def test_a_quantised_model_is_refused_with_the_reason(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quantised"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedBaseModel, match="quantised"):
        load_base_model(str(folder))


def test_a_bfloat16_base_is_certified_in_bfloat16(base: Path, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "memory", str(base), dtype="bfloat16") as store:
        store.write(numbers(4))
        (adapter,) = store.adapters()
        assert adapter.proof["dtypes"] == {"base": "bfloat16", "adapter": "float32"}
    with MemoryStore(tmp_path / "memory", create=False) as store:
        assert store.base.dtype == "bfloat16"
        assert {key: store.recall(key) for key in numbers(4)} == numbers(4)
