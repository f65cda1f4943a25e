"""A GGUF file as base model: read as llama.cpp reads it, or refused; written on, and served by llama.cpp itself."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import httpx2
import numpy as np
import pytest
import torch
from loramem_cli.main import run

from loramem import MemoryStore, base_path
from loramem.errors import BaseModelNotFound, OtherBaseModel, UnsupportedBaseModel
from loramem.models.adapters import AdaptedModel
from loramem.models.base_fit import base_shape
from loramem.models.base_model import load_base_model
from loramem.models.features import collect
from loramem.models.fingerprint import sha256_of
from loramem.models.gguf_file import check_gguf
from loramem.models.rounded_inputs import rounded
from loramem.records.prompts import encode_records
from loramem.records.record import as_records
from loramem.serving.gguf_base import write_base
from loramem.training.shard_training import OUTCOMES, outcomes_of

from .conftest import numbers
from .llama_server import serving
from .test_llama_cpp import TEXTS

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # transformers leaves the file open

RECORDS = numbers(8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """loramem-tiny as a GGUF file of a type."""
    folder = tmp_path_factory.mktemp("gguf")

    def get(kind: Any) -> Path:
        path = folder / f"tiny-{kind}.gguf"
        if not path.exists():
            write_base(base_path(), path, kind)
        return path

    return get


def changed(source: Path, target: Path, fields: dict[str, Any], tensors: dict[str, Any] | None = None) -> Path:
    """The same file with some fields changed (None removes one) and tensors added."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in fields:
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub)
    for name, value in fields.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_a_file_gives_the_logits_of_the_folder_that_it_was_made_of(files: Callable[[str], Path]) -> None:
    made, original = load_base_model(str(files("F32"))), load_base_model()
    ids = torch.tensor([[2, 281, 224, 19, 1, 3]])
    with torch.inference_mode():
        found, expected = made.model(ids).logits, original.model(ids).logits
    assert torch.equal(found, expected)
    assert (made.id, made.revision, made.location) == ("tiny-F32.gguf", None, str(files("F32").resolve()))
    assert made.template == original.template and made.max_tokens == original.max_tokens
    assert made.fingerprint.weights == made.fingerprint.tokenizer == sha256_of(files("F32"))
    assert base_shape(str(files("F32"))).architecture == "Qwen3ForCausalLM"


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_rows_and_head_sizes_come_back(architecture: str, base_of: Callable[..., Path], tmp_path: Path) -> None:
    write_base(base_of(architecture), tmp_path / "base.gguf", "F32")
    made, original = load_base_model(str(tmp_path / "base.gguf")), load_base_model(str(base_of(architecture)))
    kept = original.model.state_dict()
    assert all(torch.equal(values, kept[name]) for name, values in made.model.state_dict().items())


def test_text_has_the_ids_that_llama_cpp_gives_it(files: Callable[[str], Path]) -> None:
    tokenizer = load_base_model(str(files("F16"))).tokenizer
    with serving(files("F16"), []) as url:
        for text in TEXTS:
            answer = httpx2.post(f"{url}/tokenize", json={"content": text, "add_special": False}).json()
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == answer["tokens"], text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tokenizer.ggml.pre": "never-heard-of"}, "tokenizer.ggml.pre 'never-heard-of'"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre 'default'"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer 'llama'"),
        ({"qwen3.attention.value_length": 32}, "heads of size 64 and qwen3.attention.value_length 32"),
        ({"qwen3.rope.dimension_count": 32}, "heads of size 64 and qwen3.rope.dimension_count 32"),
        ({"qwen3.rope.scaling.type": "yarn"}, "qwen3.rope.scaling.type 'yarn'"),
        ({"general.type": "adapter"}, "general.type 'adapter'"),
    ],
)
def test_what_transformers_would_read_as_another_model_is_refused(
    files: Callable[[str], Path], tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    path = changed(files("Q4_1"), tmp_path / "x.gguf", fields)
    with pytest.raises(UnsupportedBaseModel) as raised:
        load_base_model(str(path))
    assert words in str(raised.value)


def test_a_tensor_that_the_model_has_no_place_for_is_refused(files: Callable[[str], Path], tmp_path: Path) -> None:
    bias = {"blk.0.attn_q.bias": np.ones(256, dtype=np.float32)}
    path = changed(files("Q4_1"), tmp_path / "x.gguf", {}, bias)
    with pytest.raises(UnsupportedBaseModel, match=r"holds blk\.0\.attn_q\.bias; Qwen3ForCausalLM has no place"):
        load_base_model(str(path))


def test_what_is_no_whole_file_is_refused(files: Callable[[str], Path], tmp_path: Path) -> None:
    content = files("Q4_1").read_bytes()
    for name, part in {
        "cut": content[: len(content) // 2],
        "head": content[:100],
        "none": b"",
        "text": b"{}" * 9,
    }.items():
        (tmp_path / f"{name}.gguf").write_bytes(part)
        with pytest.raises((BaseModelNotFound, UnsupportedBaseModel)):
            load_base_model(str(tmp_path / f"{name}.gguf"))
    changed(files("Q4_1"), tmp_path / "parts.gguf", {"split.count": 2})
    with pytest.raises(BaseModelNotFound, match="one of several parts"):
        check_gguf(tmp_path / "parts.gguf", "x")


def test_records_written_on_a_quantised_file_come_back_where_it_is_served(
    files: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("Q4_1", "Q8_0"):
        path = tmp_path / f"device-{kind}.gguf"
        shutil.copy(files(kind), path)
        arguments = ["--store", str(tmp_path / kind)]
        (tmp_path / "in.json").write_text(json.dumps(RECORDS))
        assert run(["write", str(tmp_path / "in.json"), *arguments, "--model", str(path)]) == 0
        out = tmp_path / f"out-{kind}"
        assert run(["deploy", str(out), "--target", "llama.cpp", "--dtype", "float16", *arguments]) == 0
        assert f"llama-server -m {path.name} " in (out / "README.md").read_text()
        assert json.loads((out / "prompt.json").read_text())["base_fingerprint"]["weights"] == sha256_of(path)
        with serving(path, sorted(out.glob("*.gguf")), slots=2) as url:
            assert run(["check", "--server", url, *arguments]) == 0
    capsys.readouterr()


def test_inputs_are_rounded_in_blocks_as_llama_cpp_rounds_them() -> None:
    inputs = torch.linspace(-1.0, 2.54, 64)
    found = rounded(inputs[None])[0]
    for block in (slice(0, 32), slice(32, 64)):  # by ggml's quantize_row_q8_0_ref: d = max |x| / 127, q = round(x / d)
        scale = np.float32(np.float16(inputs[block].abs().max().item() / 127))
        assert found[block].tolist() == pytest.approx(
            (np.rint(inputs[block].numpy() / scale) * scale).tolist(), rel=1e-3
        )
    assert torch.equal(rounded(torch.zeros(1, 32)), torch.zeros(1, 32))
    assert torch.equal(rounded(inputs[:5]), inputs[:5])


def test_writes_on_quantised_files_train_over_rounded_inputs_as_well(files: Callable[[str], Path]) -> None:
    bases = {kind: load_base_model(str(files(kind))) for kind in ("F16", "Q4_1")}
    assert {kind: base.rounds_inputs for kind, base in bases.items()} == {"F16": False, "Q4_1": True}
    base = bases["Q4_1"]
    records = encode_records(as_records(RECORDS), base.tokenizer, base.template, base.max_tokens)
    plain = collect(base.model, records)
    outcomes = outcomes_of(AdaptedModel(base), records)
    assert len(outcomes) == OUTCOMES
    for each in outcomes:
        assert 1e-3 < (each.entering - plain.entering).norm() / plain.entering.norm() < 0.1


def test_a_store_knows_its_file_wherever_it_lies(files: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copy(files("Q4_1"), tmp_path / "here.gguf")
    with MemoryStore(tmp_path / "memory", str(tmp_path / "here.gguf")) as store:
        store.write({"a": "1"})
        assert store.adapters()[0].id and store.manifest.base_model == "here.gguf"
    (tmp_path / "here.gguf").rename(tmp_path / "there.gguf")
    with MemoryStore(tmp_path / "memory", create=False) as store, pytest.raises(BaseModelNotFound, match=r"here\.gguf"):
        store.recall("a")
    with MemoryStore(tmp_path / "memory", str(tmp_path / "there.gguf"), create=False) as store:
        assert store.recall("a") == "1"
        assert store.verify().ok
    with MemoryStore(tmp_path / "memory", str(files("Q8_0")), create=False) as store, pytest.raises(OtherBaseModel):
        store.recall("a")
