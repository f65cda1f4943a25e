"""Served in eight bits: what llama.cpp computes of a Q8_0 file, simulated, trained over and proved."""

import math
from pathlib import Path

import pytest
import torch
from loramem_cli.main import run

from loramem import MemoryStore, base_path
from loramem.errors import UnsupportedBaseModel
from loramem.models.adapters import AdaptedModel
from loramem.models.base_model import load_base_model
from loramem.models.batches import shuffled
from loramem.models.certificate import _check_drafts, _check_ending
from loramem.models.ending import Ending, _sizes
from loramem.models.features import PASS_RECORDS, PASS_TOKENS, collect
from loramem.models.rounded_inputs import rounded
from loramem.records.prompts import EncodedRecord, encode_records
from loramem.records.record import as_records
from loramem.serving.gguf_base import write_base
from loramem.store.planner import EIGHT_BITS_ROOM
from loramem.training.shard_training import OUTCOMES, outcomes_of

from .conftest import numbers
from .llama_server import serving

RECORDS = numbers(20)


@pytest.fixture(scope="module")
def eight_bits() -> AdaptedModel:
    return AdaptedModel(load_base_model(dtype="q8_0"))


def encoded(adapted: AdaptedModel, count: int) -> list[EncodedRecord]:
    base = adapted.base
    return encode_records(as_records(numbers(count)), base.tokenizer, base.template, base.max_tokens)


def test_weights_and_inputs_of_linear_modules_are_rounded_and_nothing_else_is(eight_bits: AdaptedModel) -> None:
    plain = load_base_model()
    assert eight_bits.base.fingerprint == plain.fingerprint
    for (name, ours), (_, theirs) in zip(
        eight_bits.model.named_parameters(), plain.model.named_parameters(), strict=True
    ):
        assert torch.equal(ours, rounded(theirs) if theirs.ndim == 2 else theirs), name
    layer = eight_bits.model.get_submodule("model.layers.0.mlp.up_proj")
    inputs = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(inputs), torch.nn.functional.linear(rounded(inputs), layer.weight))


def test_outcomes_differ_from_one_another_less_than_from_the_base(eight_bits: AdaptedModel) -> None:
    records = encoded(eight_bits, 6)
    exact = collect(load_base_model().model, records).entering
    found = [each.entering for each in outcomes_of(eight_bits, records)]
    again = [each.entering for each in outcomes_of(eight_bits, records)]
    assert len(found) == OUTCOMES and all(map(torch.equal, found, again))
    moved = float((found[0] - exact).norm() / exact.norm())
    apart = float((found[0] - found[1]).norm() / exact.norm())
    assert 1e-3 < apart < moved < 0.2


def test_a_position_has_what_its_outcomes_share_and_the_rest_of_some_position(eight_bits: AdaptedModel) -> None:
    records = encoded(eight_bits, 6)
    mine = collect(load_base_model().model, records)
    others = outcomes_of(eight_bits, records)
    ending = Ending(eight_bits.model, mine)
    ending.deviate([], 2.0, [Ending(eight_bits.model, each) for each in others])
    moved = torch.stack([each.entering - mine.entering for each in others]) / _sizes(mine.entering)
    common, rest = moved.mean(0), moved - moved.mean(0)
    factor = 2.0 * math.sqrt((OUTCOMES + 1) / (OUTCOMES - 1))
    for number, each in enumerate(ending._deviations):
        order = torch.randperm(len(mine), generator=torch.Generator().manual_seed(number))
        found = each.at(("entering", None), slice(None), order)
        torch.testing.assert_close(found, common + factor * rest[number][order], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store on loramem-tiny that is to be served by llama.cpp on a Q8_0 file of it."""
    path = tmp_path_factory.mktemp("q8_0") / "memory"
    with MemoryStore(path, serve=["bfloat16", "q8_0"]) as store:
        store.write(RECORDS)
    return path


def test_a_store_is_proved_in_eight_bits_and_looked_at_there(written: Path) -> None:
    with MemoryStore(written, create=False) as store:
        (adapter,) = store.adapters()
        assert adapter.proof["served"]["q8_0"]["dtypes"] == {"base": "q8_0", "adapter": "float32"}
        assert adapter.proof["served"]["q8_0"]["min_prob"] >= store.manifest.certify_threshold
        (looked_at,) = store.check(["peft"], dtype="q8_0").certificates
        assert looked_at.exact == len(RECORDS) and looked_at.dtypes["base"] == "q8_0"
        assert {key: store.recall(key) for key in RECORDS} == RECORDS


@pytest.mark.parametrize("rung", [0, 2])
def test_the_end_of_the_model_alone_gives_what_all_of_it_does_in_eight_bits(
    eight_bits: AdaptedModel, rung: int
) -> None:
    """An adapter sees inputs as they are, where the module of the base that it sits on sees them in eight bits."""
    records = encoded(eight_bits, 6)
    features = collect(eight_bits.model, records)
    eight_bits.create("new", 4, eight_bits.ladder[rung], 0)
    generator = torch.Generator().manual_seed(0)
    for name, weight in eight_bits.weights("new").items():
        if "lora_B" in name:
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    drafts = shuffled(records, PASS_RECORDS, PASS_TOKENS)
    whole = {index: least for index, least, _ in _check_drafts(eight_bits.model, records, drafts)}
    ending = Ending(eight_bits.model, features, eight_bits.lora_layers("new"))
    alone = {index: least for index, least, _ in _check_ending(ending)}
    eight_bits.remove("new")
    assert alone == pytest.approx(whole, rel=1e-5)


def test_what_is_written_for_eight_bits_comes_back_from_llama_cpp_on_a_q8_0_file(written: Path, tmp_path: Path) -> None:
    write_base(base_path(), tmp_path / "base.gguf", "Q8_0")
    with MemoryStore(written, create=False) as store:
        store.deploy("llama.cpp", tmp_path / "served")
        adapters = [tmp_path / "served" / f"{adapter.id}.gguf" for adapter in store.adapters()]
        with serving(tmp_path / "base.gguf", adapters) as url:
            report = store.check_server(url, "llama.cpp", at_once=1)
    assert report.ok and sum(one.exact for one in report.adapters) == len(RECORDS)


def test_first_ranks_leave_room_for_eight_bits(written: Path, tmp_path: Path) -> None:
    records = {f"other {key}": value for key, value in RECORDS.items()}
    with MemoryStore(written, create=False) as rounded_store, MemoryStore(tmp_path / "m") as plain:
        (wanted,), (least,) = (store.plan(records).shards for store in (rounded_store, plain))
        assert least.rank < wanted.rank <= math.ceil(EIGHT_BITS_ROOM * least.rank)
        assert [shard.rank for shard in rounded_store.plan(records, rank=3).shards] == [3]


def test_a_store_is_not_written_in_what_adapters_are_served_in(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnsupportedBaseModel, match="give serve"):
        MemoryStore(tmp_path / "m", dtype="q8_0")
    assert not (tmp_path / "m").exists()
    assert run(["deploy", str(tmp_path / "out"), "--target", "peft", "--dtype", "q8_0"]) == 2
    assert "q8_0" in capfd.readouterr().err
