"""Adapters in other hands: PEFT alone, several in one batch, and folders written for servers."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loramem_cli.main import run
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loramem import MemoryStore, base_path
from loramem.errors import AdapterError, ArgumentError, IntegrityError, NotServable, StoreError
from loramem.models.adapter_header import read_header
from loramem.serving.deploy import pad

from .conftest import numbers
from .test_integrity import execute, flip_bit, reseal

RECORDS = numbers(6)
PADDED = 24


@pytest.fixture(scope="module")
def written(base_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A store of two adapters, of a tiny base of an architecture or of the embedded one."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "memory"
            with MemoryStore(made[name], None if name == "embedded" else str(base_of(name))) as store:
                store.write(dict(list(RECORDS.items())[:3]))
                store.write(dict(list(RECORDS.items())[3:]))
        return made[name]

    return get


@pytest.fixture
def store(written: Callable[[str], Path]) -> Iterator[MemoryStore]:
    with MemoryStore(written("qwen3"), create=False) as opened:
        yield opened


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "routing.jsonl").read_text().splitlines()]


def loaded(base: Path, folder: Path, adapters: list[str]) -> PeftModel:
    """Base and adapters as PEFT alone loads them."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(model, folder / adapters[0], adapter_name=adapters[0])
    for adapter in adapters[1:]:
        peft.load_adapter(folder / adapter, adapter_name=adapter)
    return peft.eval()


def padded_left(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def recalled_in_one_batch(base: Path, folder: Path, routes: list[dict[str, Any]]) -> dict[str, str]:
    """Values of all keys, each row of the batch through its own adapter, with nothing of loramem."""
    names = sorted({route["adapter"] for route in routes})
    peft, tokenizer = loaded(base, folder, names), AutoTokenizer.from_pretrained(base)
    ids, mask = padded_left([route["prompt_ids"] for route in routes])
    output = peft.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max(route["max_tokens"] for route in routes),
        do_sample=False,
        adapter_names=[route["adapter"] for route in routes],
    )
    texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return dict(zip((route["key"] for route in routes), texts, strict=True))


@pytest.mark.parametrize("name", ["embedded", "qwen3", "llama", "mistral"])
def test_adapters_recall_in_one_mixed_batch_as_they_are_and_deployed_with_a_padded_rank(
    name: str, written: Callable[[str], Path], base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base, memory = base_path() if name == "embedded" else base_of(name), written(name)
    with MemoryStore(memory, create=False) as store:
        report = store.deploy("peft", tmp_path / "deployed", pad_rank=PADDED, include_keys=True)
        ids = [adapter.id for adapter in store.adapters()]
        assert list(report.adapters) == ids and len(ids) == 2
    routes = lines(tmp_path / "deployed")[::2] + lines(tmp_path / "deployed")[1::2]
    assert [route["adapter"] for route in routes] != sorted(route["adapter"] for route in routes)

    assert recalled_in_one_batch(base, memory / "adapters", routes) == RECORDS
    assert recalled_in_one_batch(base, tmp_path / "deployed", routes) == RECORDS

    prompt = torch.tensor([routes[0]["prompt_ids"]])
    for adapter in ids:
        assert read_header(tmp_path / "deployed" / adapter).rank == PADDED
        with torch.inference_mode():
            as_written = loaded(base, memory / "adapters", [adapter])(prompt).logits
            as_padded = loaded(base, tmp_path / "deployed", [adapter])(prompt).logits
        assert torch.allclose(as_written, as_padded, rtol=1e-5, atol=1e-4)


def test_padding_adds_zeros_and_keeps_the_scaling() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "m.lora_A.weight": torch.randn(3, 5, generator=generator),
        "m.lora_B.weight": torch.randn(7, 3, generator=generator),
    }
    config, padded = pad({"r": 3, "lora_alpha": 7, "bias": "none"}, tensors, 8)
    assert config == {"r": 8, "lora_alpha": 7 * 8 / 3, "bias": "none"}
    assert padded["m.lora_A.weight"][3:].count_nonzero() == padded["m.lora_B.weight"][:, 3:].count_nonzero() == 0
    before = tensors["m.lora_B.weight"] @ tensors["m.lora_A.weight"] * (7 / 3)
    after = padded["m.lora_B.weight"] @ padded["m.lora_A.weight"] * (config["lora_alpha"] / config["r"])
    assert torch.allclose(before, after)
    assert pad({"r": 3, "lora_alpha": 6}, tensors, 8)[0]["lora_alpha"] == 16


def test_without_options_a_folder_holds_the_adapters_as_committed(store: MemoryStore, tmp_path: Path) -> None:
    report = store.deploy("peft", tmp_path / "out")
    for adapter in store.adapters():
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            source = store.path / "adapters" / adapter.id / name
            assert (tmp_path / "out" / adapter.id / name).read_bytes() == source.read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [*report.adapters, "README.md", "prompt.json"]
    )
    assert {path.name for path in (tmp_path / "out").rglob("*") if path.stat().st_mode & 0o004 == 0} == set()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_cast_and_named_as_the_server_wants_them(store: MemoryStore, dtype: str, tmp_path: Path) -> None:
    report = store.deploy("vllm", tmp_path / "out", base_name="someone/model", pad_rank=PADDED, dtype=dtype)
    assert (report.base_name, report.rank, report.dtype) == ("someone/model", PADDED, dtype)
    for adapter in store.adapters():
        config = json.loads((tmp_path / "out" / adapter.id / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (
            "someone/model",
            PADDED,
            2 * PADDED,
        )
        written = load_file(store.path / "adapters" / adapter.id / "adapter_model.safetensors")
        for name, tensor in load_file(tmp_path / "out" / adapter.id / "adapter_model.safetensors").items():
            rows, columns = written[name].shape
            assert torch.equal(tensor[:rows, :columns], written[name].to(getattr(torch, dtype)))


def test_no_key_value_or_path_goes_along_unless_asked(store: MemoryStore, base: Path, tmp_path: Path) -> None:
    def found(folder: Path, words: list[str]) -> set[str]:
        contents = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
        return {word for word in words if any(word.encode() in content for content in contents)}

    paths = [str(store.path), str(base.parent)]
    store.deploy("vllm", tmp_path / "silent", base_name="someone/model")
    assert found(tmp_path / "silent", [*RECORDS, *RECORDS.values(), *paths]) == set()
    store.deploy("sglang", tmp_path / "routed", include_keys=True)
    assert found(tmp_path / "routed", [*RECORDS, *RECORDS.values(), *paths]) == set(RECORDS)
    template, tokenizer = store.manifest.template(), store.base.tokenizer
    for line, record in zip(lines(tmp_path / "routed"), store.records(), strict=True):
        assert line == {
            "namespace": "",
            "key": record.key,
            "adapter": record.adapter,
            "prompt_ids": template.prompt_ids(tokenizer, record.key),
            "chat": True,
            "max_tokens": record.answer_tokens + 1,
        }


def test_a_routing_file_may_hold_salted_digests_in_place_of_keys(store: MemoryStore, tmp_path: Path) -> None:
    store.deploy("sglang", tmp_path / "out", hash_keys=True)
    found = lines(tmp_path / "out")
    assert len({line["salt"] for line in found}) == 1 and "prompt_ids" not in found[0]
    by_digest = {line["digest"]: line for line in found}
    for record in store.records():
        digest = hashlib.sha256(json.dumps([found[0]["salt"], "", record.key]).encode()).hexdigest()
        assert (by_digest[digest]["adapter"], by_digest[digest]["max_tokens"]) == (record.adapter, 5)
    assert not any(key in (tmp_path / "out" / "routing.jsonl").read_text() for key in RECORDS)
    with pytest.raises(ArgumentError, match="not both"):
        store.deploy("sglang", tmp_path / "both", include_keys=True, hash_keys=True)


def test_what_names_keys_stays_private(store: MemoryStore, tmp_path: Path) -> None:
    store.deploy("peft", tmp_path / "out", include_keys=True)
    assert (tmp_path / "out" / "routing.jsonl").stat().st_mode & 0o077 == 0


def test_the_guide_of_vllm_says_what_its_resolver_does_offline_and_outside_the_folder(
    store: MemoryStore, tmp_path: Path
) -> None:
    report = store.deploy("vllm", tmp_path / "out", base_name="someone/model")
    text = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "HF_HUB_OFFLINE=1",
        "--lora-modules " + " ".join(f"{name}=./{name}" for name in report.adapters),
        "`../x` loads what lies outside it",
        '"max_tokens": 5',  # four digits and the end token
        "**The key must be the one and only message",
    ):
        assert words in text


def test_a_deployed_folder_says_which_base_it_needs(store: MemoryStore, tmp_path: Path) -> None:
    store.deploy("vllm", tmp_path / "out", base_name="someone/model")
    prompt = json.loads((tmp_path / "out" / "prompt.json").read_text())
    assert prompt["base_model"] == "someone/model" and prompt["base_fingerprint"] == store.manifest.fingerprint


def test_the_guide_says_how_each_server_is_started(store: MemoryStore, tmp_path: Path) -> None:
    first = store.adapters()[0].id
    for target, expected in {
        "vllm": (
            'VLLM_LORA_RESOLVER_CACHE_DIR="$PWD"',
            "vllm serve someone/model",
            "--enable-lora --max-lora-rank 32 --max-loras 2",
            f'"model": "{first}"',
            "vLLM 0.32 was run so",
            f"--lora-modules {first}=./{first} ",
            '"max_tokens": 5,',  # of the longest value, and the end token
            "with a system message or an earlier turn before it, no key is answered rightly.**",
        ),
        "sglang": (
            "--model-path someone/model",
            "--max-lora-rank 24",
            "--lora-target-modules down_proj \\\n",
            f"--lora-paths {first}=./{first}",
            f'"lora_path": "{first}"',
            "not run by loramem",
        ),
        "peft": (f'PeftModel.from_pretrained(base, "{first}"', "'someone/model'"),
    }.items():
        store.deploy(target, tmp_path / target, base_name="someone/model", pad_rank=PADDED)
        text = (tmp_path / target / "README.md").read_text()
        assert [words for words in expected if words not in text] == []
    store.deploy("sglang", tmp_path / "local")
    assert "--model-path FOLDER_OF_THE_BASE_MODEL" in (tmp_path / "local" / "README.md").read_text()


def test_what_a_server_would_refuse_is_not_written(store: MemoryStore, tmp_path: Path) -> None:
    with pytest.raises(NotServable, match="base_model_name_or_path 'tiny-qwen3'") as raised:
        store.deploy("vllm", tmp_path / "out")
    assert raised.value.target == "vllm" and len(raised.value.findings) == 2
    with pytest.raises(NotServable, match="ends at 512"):
        store.deploy("vllm", tmp_path / "out", base_name="someone/model", pad_rank=600)
    with pytest.raises(AdapterError, match="above --pad-rank 1"):
        store.deploy("peft", tmp_path / "out", pad_rank=1)
    with pytest.raises(ArgumentError, match="dtype must be"):
        store.deploy("peft", tmp_path / "out", dtype="int8")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_left_alone(store: MemoryStore, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(StoreError, match="exists already"):
        store.deploy("peft", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_damage_is_not_deployed(store: MemoryStore, tmp_path: Path) -> None:
    shutil.copytree(store.path, tmp_path / "memory")
    adapter = store.adapters()[1].id
    flip_bit(tmp_path / "memory" / "adapters" / adapter / "adapter_model.safetensors", 12_000)
    with MemoryStore(tmp_path / "memory", create=False) as copy:
        for ask in (lambda: copy.deploy("peft", tmp_path / "out"), copy.check):
            with pytest.raises(IntegrityError, match=adapter):
                ask()
    assert [path.name for path in tmp_path.iterdir()] == ["memory"]


def test_weights_beyond_float16_are_refused(store: MemoryStore, tmp_path: Path) -> None:
    from loramem.serving import deploy

    config, tensors = deploy._committed(store.path, store.adapters()[0])
    huge = {name: tensor * 1e6 for name, tensor in tensors.items()}
    with pytest.raises(NotServable, match="beyond the range of float16"):
        deploy._files("x", config, huge, deploy.Deployment("peft", dtype="float16"))
    assert deploy._files("x", config, huge, deploy.Deployment("peft", dtype="bfloat16"))


def test_dead_records_in_the_weights_are_told_of(store: MemoryStore, tmp_path: Path) -> None:
    shutil.copytree(store.path, tmp_path / "memory")
    with MemoryStore(tmp_path / "memory", create=False) as copy:
        assert "tombstones" not in {finding.rule for finding in copy.check().findings}
        copy.delete("key 0")
        (note,) = (finding for finding in copy.check(["peft"]).findings)
        assert note.rule == "tombstones" and not note.refused and note.what.endswith(", 1 of them")
        assert "compact" in copy.deploy("peft", tmp_path / "out").findings[0].remedy


# The commands


def test_check_shows_who_takes_what(store: MemoryStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "--store", str(store.path)]) == 7
    shown = capsys.readouterr()
    for adapter in store.adapters():
        row = next(line for line in shown.out.splitlines() if adapter.id in line)
        assert row.split() == [adapter.id, str(adapter.rank), "ok", "refused", "ok", "ok"]
    first = store.adapters()[0].id  # what is alike is said once
    assert shown.err.count(f"vllm {first} and 1 more: base_model_name_or_path 'tiny-qwen3'") == 1
    assert shown.err.count("--base-name NAME") == 1 and "sglang: note: " in shown.err
    assert run(["check", "--store", str(store.path), "--target", "peft"]) == 0
    capsys.readouterr()


def test_check_decodes_in_the_dtype_of_a_server(store: MemoryStore, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["check", "--store", str(store.path), "--target", "sglang", "--dtype", "bfloat16"]
    assert run(arguments) == 0
    shown = capsys.readouterr()
    assert "in bfloat16:" in shown.out and shown.out.count("3/3") == 2 and shown.err == ""
    assert all(shown.out.count(adapter.id) == 2 for adapter in store.adapters())
    assert run([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and len(report["certificates"]) == 2
    for one in report["certificates"]:
        assert one["dtypes"] == {"base": "bfloat16", "adapter": "bfloat16"}
        assert one["margin"] == one["min_prob"] - 0.5 > 0


def test_check_exits_3_when_a_record_does_not_come_back(
    store: MemoryStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(store.path, tmp_path / "memory")
    execute(tmp_path / "memory", "update records set salt = 'other' where key = 'key 1'")
    reseal(tmp_path / "memory")
    assert run(["check", "--store", str(tmp_path / "memory"), "--target", "peft", "--dtype", "float32"]) == 3
    shown = capsys.readouterr()
    assert "2/3" in shown.out and "not recalled in float32: 'key 1'" in shown.err


def test_the_name_of_the_base_is_a_note_for_a_store_and_hides_no_record_that_fails(
    store: MemoryStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`deploy --base-name` writes that name, and the adapters of a store are no files to be served as they are."""
    ask = ["check", "--target", "vllm", "--base-name", "someone/model", "--store"]
    assert run([*ask, str(store.path)]) == 0
    assert f"note: base_model_name_or_path '{store.manifest.base_model}'" in capsys.readouterr().err
    folder = str(store.path / "adapters" / store.adapters()[0].id)
    assert run(["check", folder, "--target", "vllm", "--base-name", "someone/model"]) == 7
    shutil.copytree(store.path, tmp_path / "memory")
    execute(tmp_path / "memory", "update records set salt = 'other' where key = 'key 1'")
    reseal(tmp_path / "memory")
    without_name = ["check", "--target", "vllm", "--store", str(tmp_path / "memory")]
    assert run(without_name) == 7
    assert run([*without_name, "--dtype", "float32"]) == 3
    capsys.readouterr()


def test_the_lowest_probability_is_of_every_record_alone_as_well(store: MemoryStore) -> None:
    reader = store._session.served_in("bfloat16").reader
    alone = min(
        token.prob
        for record in store.records()
        for token in reader.token_probabilities(store._index.located([record])[0], RECORDS[record.key])
    )
    report = store.check(["vllm"], dtype="bfloat16")
    assert min(one.min_prob for one in report.certificates if one.min_prob is not None) <= alone


def test_check_reads_adapters_of_others(store: MemoryStore, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = store.path / "adapters" / store.adapters()[0].id
    foreign = tmp_path / "foreign"
    shutil.copytree(folder, foreign)
    config = json.loads((foreign / "adapter_config.json").read_text())
    (foreign / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    assert run(["check", str(foreign), str(folder), "--target", "sglang", "--json"]) == 7
    report = json.loads(capsys.readouterr().out)
    assert report["adapters"].keys() == {"foreign", folder.name}
    assert [(finding["adapter"], finding["rule"]) for finding in report["findings"]] == [("foreign", "use_rslora")]
    assert run(["check", str(tmp_path), "--target", "peft"]) == 1
    assert "no PEFT adapter" in capsys.readouterr().err
    assert run(["check", str(foreign), "--dtype", "bfloat16"]) == 2
    capsys.readouterr()


def test_deploy_prints_what_it_wrote(store: MemoryStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["deploy", str(tmp_path / "out"), "--store", str(store.path), "--target", "vllm"]
    assert run(arguments) == 7
    assert "--base-name NAME" in capsys.readouterr().err
    assert run([*arguments, "--base-name", "someone/model", "--dtype", "bfloat16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["base_name"] == "someone/model" and len(report["adapters"]) == 2
    assert run([*arguments, "--base-name", "someone/model"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert run(["check", *(str(tmp_path / "out" / name) for name in report["adapters"]), "--target", "vllm"]) == 0
    capsys.readouterr()
