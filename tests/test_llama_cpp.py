"""Adapters served by llama.cpp itself: what `loramem deploy` writes is loaded, asked for every key, and compared."""

import json
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import pytest
from loramem_cli.main import run

from loramem import MemoryStore
from loramem.errors import ArgumentError, NotServable
from loramem.serving.gguf_adapter import Heads
from loramem.serving.gguf_base import write_base
from loramem.training import shards

from .conftest import numbers
from .llama_server import post, serving

RECORDS = numbers(20)
TEXTS = ["a 123 b", "  two  blanks\n\nand lines", "1,000.50 €", "don't", "naïve 東京 ½ ²", "tab\there"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two adapters on loramem-tiny, and in "served" what is deployed of it."""
    path = tmp_path_factory.mktemp("tiny") / "memory"
    with MemoryStore(path) as store:
        store.write(dict(list(RECORDS.items())[:10]))
        store.write(dict(list(RECORDS.items())[10:]))
        store.deploy("llama.cpp", path.parent / "served", include_keys=True)
    return path


@pytest.fixture(scope="module")
def llama(base_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two adapters in all modules of a Llama, q and k among them, and that base as GGUF in "base.gguf"."""
    path = tmp_path_factory.mktemp("llama") / "memory"
    with pytest.MonkeyPatch.context() as patched, MemoryStore(path, str(base_of("llama"))) as store:
        patched.setattr(shards, "features_of", lambda *_: None)
        store.write(dict(list(RECORDS.items())[:4]))
        store.write(dict(list(RECORDS.items())[4:8]))
        assert [{"q_proj", "k_proj"} <= set(one.placement["modules"]) for one in store.adapters()] == [True, True]
    write_base(base_of("llama"), path.parent / "base.gguf", "F32")
    return path


@pytest.fixture
def store(tiny: Path) -> Iterator[MemoryStore]:
    with MemoryStore(tiny, create=False) as opened:
        yield opened


def routes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "routing.jsonl").read_text().splitlines()]


def places(url: str) -> dict[str, int]:
    """What the server numbers its adapters by."""
    return {Path(each["path"]).stem: each["id"] for each in httpx2.get(f"{url}/lora-adapters").json()}


def asked(url: str, route: dict[str, Any], adapter: int | None, **also: object) -> tuple[str, float]:
    """The text, and the lowest probability of its tokens and the end token; "…" where it goes on."""
    lora = [] if adapter is None else [{"id": adapter, "scale": 1.0}]
    found: Any = post(
        url,
        **{
            "prompt": route["prompt_ids"],
            "n_predict": route["max_tokens"],
            "lora": lora,
            "temperature": 0,
            "n_probs": 1,
            "cache_prompt": False,
            **also,
        },
    )
    lowest = min(math.exp(token["logprob"]) for token in found["completion_probabilities"])
    return found["content"] + "…" * (found["stop_type"] != "eos"), lowest


def test_every_value_comes_back_with_the_certified_probability(store: MemoryStore) -> None:
    folder = store.path.parent / "served"
    certified = {record.key: record.min_prob for record in store.records()}
    adapters = sorted(folder.glob("????????????????????????????????.gguf"))
    assert [path.stem for path in adapters] == sorted(adapter.id for adapter in store.adapters())
    with serving(folder / "loramem-tiny-F32.gguf", adapters) as url:
        found = {route["key"]: asked(url, route, places(url)[route["adapter"]]) for route in routes(folder)}
    assert {key: value for key, (value, _) in found.items()} == RECORDS
    apart = [abs(p - certified[key]) for key, (_, p) in found.items()]  # its arithmetic moves a single one further
    assert median(apart) < 0.005 and max(apart) < 0.03


def test_the_embedded_base_has_the_same_ids_there(store: MemoryStore) -> None:
    tokenizer, folder = store.base.tokenizer, store.path.parent / "served"
    with serving(folder / "loramem-tiny-F32.gguf", []) as url:
        for text in TEXTS:
            answer = httpx2.post(f"{url}/tokenize", json={"content": text, "add_special": False}).json()
            assert answer["tokens"] == tokenizer(text, add_special_tokens=False)["input_ids"], text


def test_rows_of_q_and_k_move_with_those_of_llama(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recalled(folder: Path) -> dict[str, tuple[str, float]]:
        with serving(llama.parent / "base.gguf", list(folder.glob("*.gguf"))) as url:
            number = places(url)
            return {route["key"]: asked(url, route, number[route["adapter"]]) for route in routes(folder)}

    with MemoryStore(llama, create=False) as store:
        expected = {
            record.key: (RECORDS[record.key], pytest.approx(record.min_prob, abs=0.01)) for record in store.records()
        }
        store.deploy("llama.cpp", tmp_path / "right", include_keys=True)
        assert recalled(tmp_path / "right") == expected
        # The conversion that loads as well, and computes something else: the comparison above tells it.
        monkeypatch.setattr(Heads, "reordered", lambda _self, _module, rows: rows)
        store.deploy("llama.cpp", tmp_path / "wrong", include_keys=True)
        assert recalled(tmp_path / "wrong") != expected


def test_requests_as_the_guide_has_them_are_not_mixed_by_the_prompt_cache(llama: Path, tmp_path: Path) -> None:
    """P of one adapter and then of the other, which without the cache computes every key and value of P anew."""
    with MemoryStore(llama, create=False) as store:
        names = store.deploy("llama.cpp", tmp_path / "out", include_keys=True).adapters
    adapters, every = [tmp_path / "out" / f"{name}.gguf" for name in names], routes(tmp_path / "out")
    alone = {}
    for number in range(2):
        with serving(llama.parent / "base.gguf", adapters) as url:
            alone |= {(route["key"], number): asked(url, route, number) for route in every}

    def differing(cached: bool) -> int:
        count = 0
        with serving(llama.parent / "base.gguf", adapters, cache_mib=8192 if cached else 0) as url:
            for p, q in pairwise(every):
                asked(url, p, 0, cache_prompt=cached)
                asked(url, q, 1, cache_prompt=cached)
                count += asked(url, p, 1, cache_prompt=cached) != pytest.approx(alone[p["key"], 1], abs=1e-4)
        return count

    assert differing(cached=False) == 0
    assert differing(cached=True) > 0  # why the guide says so


def test_float16_adapters_on_a_float16_base_recall(store: MemoryStore, tmp_path: Path) -> None:
    report = store.deploy("llama.cpp", tmp_path / "out", dtype="float16", include_keys=True)
    adapters = [tmp_path / "out" / f"{name}.gguf" for name in report.adapters]
    with serving(tmp_path / "out" / "loramem-tiny-F16.gguf", adapters, slots=2) as url:
        found = {
            route["key"]: asked(url, route, report.adapters.index(route["adapter"]))[0]
            for route in routes(tmp_path / "out")
        }
    assert found == RECORDS


def test_check_asks_the_server_for_every_key(store: MemoryStore, capsys: pytest.CaptureFixture[str]) -> None:
    folder = store.path.parent / "served"
    adapters = sorted(folder / f"{adapter.id}.gguf" for adapter in store.adapters())
    base = folder / "loramem-tiny-F32.gguf"
    with serving(base, adapters, slots=4) as url:
        assert run(["check", "--store", str(store.path), "--server", url, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["target"] == "llama.cpp"
        for one in report["adapters"]:
            assert (one["exact"], one["failed"]) == (10, {})
            assert one["min_prob"] == pytest.approx(one["committed_min_prob"], abs=0.01)
    with serving(base, adapters[:1]) as url:
        assert run(["check", "--store", str(store.path), "--server", url]) == 1
        assert f"was started without adapter {adapters[1].stem}" in capsys.readouterr().err


def test_check_names_what_a_wrong_base_makes_of_the_keys(
    store: MemoryStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Q4_1 is another base than the one that was written on, and llama.cpp loads the adapters all the same."""
    report = store.deploy("llama.cpp", tmp_path / "out", base_type="Q4_1")
    adapters = [tmp_path / "out" / f"{name}.gguf" for name in report.adapters]
    with serving(tmp_path / "out" / "loramem-tiny-Q4_1.gguf", adapters) as url:
        assert run(["check", "--store", str(store.path), "--server", url, "--target", "llama.cpp"]) == 3
    assert capsys.readouterr().err.startswith("llama.cpp: 'key ")


def test_the_guide_knows_what_goes_wrong_in_silence(store: MemoryStore) -> None:
    text = (store.path.parent / "served" / "README.md").read_text()
    first, second = (adapter.id for adapter in store.adapters())
    for words in (
        f"llama-server -m loramem-tiny-F32.gguf \\\n  --lora-scaled {first}.gguf:0,{second}.gguf:0",
        "--cache-ram 0",
        '"cache_prompt": false',
        "--lora-init-without-apply",
        "A number in `lora` that no adapter has is passed over",
        "An adapter of another base model of the same shape loads.",
        '"n_predict": 5',  # four digits and the end token
        "loramem check --server URL --target llama.cpp",
    ):
        assert words in text
    prompt = json.loads((store.path.parent / "served" / "prompt.json").read_text())
    assert prompt["base_fingerprint"] == store.manifest.fingerprint
    assert prompt["base_model"] == "loramem-tiny"


def test_what_cannot_be_converted_is_refused(
    store: MemoryStore, base_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ArgumentError, match="float32 or float16"):
        store.deploy("llama.cpp", tmp_path / "out", dtype="bfloat16")
    with MemoryStore(tmp_path / "neox", str(base_of("gpt_neox"))) as other:
        other.write({"a": "1"})
        with pytest.raises(NotServable, match="dense_4h_to_h"):
            other.deploy("llama.cpp", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    arguments = ["deploy", str(tmp_path / "out"), "--store", str(store.path), "--target", "llama.cpp"]
    assert run([*arguments, "--base-type", "Q8_0", "--json"]) == 0
    capsys.readouterr()
    assert (tmp_path / "out" / "loramem-tiny-Q8_0.gguf").is_file()
