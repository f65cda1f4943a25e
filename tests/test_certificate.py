"""The proof: two compositions, both of which must give every record; its certificate; the least certain alone."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from loramem import MemoryStore
from loramem.errors import RecallError
from loramem.models import certificate
from loramem.models.adapters import AdaptedModel
from loramem.models.base_model import BaseModel, load_base_model
from loramem.models.batches import shuffled
from loramem.models.certificate import ALONE, Proof, examine, least_certain, prove, prove_alone
from loramem.models.decoding import answer_probabilities
from loramem.models.ending import Ending
from loramem.models.features import PASS_RECORDS, PASS_TOKENS, collect
from loramem.models.placement import Placement
from loramem.models.prefix import SHARED_PREFIX_TOKENS
from loramem.records.prompts import EncodedRecord, encode_records
from loramem.records.record import Record, as_records
from loramem.training import shards
from loramem.training.feature_writer import train_on_features
from loramem.training.settings import WriterSettings
from loramem.training.shard_training import ShardTraining, train_shard
from loramem.training.shards import CAUTION

from .conftest import numbers
from .test_batches import encoded, of_length

DTYPES = {"base": "float32", "adapter": "float32"}


@pytest.fixture(scope="module")
def written(base: Path) -> tuple[BaseModel, list[EncodedRecord]]:
    """A base model with five records in its active adapter, values of several lengths."""
    loaded = load_base_model(str(base))
    values = {key: value * (1 + number % 3) for number, (key, value) in enumerate(numbers(5).items())}
    records = encode_records(as_records(values), loaded.tokenizer, loaded.template, loaded.max_tokens)
    placement = Placement.ladder(loaded.model)[0]
    features = [collect(loaded.model, records)]
    training = train_on_features(AdaptedModel(loaded), "new", features, len(records), 12, placement, WriterSettings())
    assert training.stubborn == ()
    return loaded, records


def test_a_certificate_is_the_lowest_teacher_forced_probability(
    written: tuple[BaseModel, list[EncodedRecord]],
) -> None:
    loaded, records = written
    proof = prove(loaded.model, records, "a", DTYPES)
    expected = [float(probs.min()) for _, probs in sorted(answer_probabilities(loaded.model, records))]
    assert proof.min_probs == pytest.approx(expected, abs=1e-5)
    assert proof.min_prob == min(proof.min_probs)
    assert proof.conditions["dtypes"] == DTYPES
    assert proof.conditions["decoded_batches"] == {"by length": [5], "drafts": [5]}


def ending_of(loaded: BaseModel, records: list[EncodedRecord]) -> Ending:
    """With the adapter that is attached."""
    layers = [module for _, module in sorted(loaded.model.named_modules()) if isinstance(module, LoraLayer)]
    return Ending(loaded.model, collect(loaded.model, records), layers)


def test_from_features_the_proof_is_the_same(written: tuple[BaseModel, list[EncodedRecord]]) -> None:
    loaded, records = written
    whole = examine(loaded.model, records)
    found = examine(loaded.model, records, ending_of(loaded, records))
    assert found.min_probs == pytest.approx(whole.min_probs, abs=1e-4)
    assert (found.wrong, found.batch_sizes) == (whole.wrong, whole.batch_sizes)


def test_a_draft_that_does_not_stand_in_features_is_refused(written: tuple[BaseModel, list[EncodedRecord]]) -> None:
    loaded, records = written
    ending = ending_of(loaded, records)
    ending.features.targets[ending.features.owners == 3] += 1
    found = examine(loaded.model, records, ending)
    assert found.wrong == {3: "shuffled, the value as a draft"}
    with pytest.raises(RecallError, match="the value as a draft") as caught:
        prove(loaded.model, records, "a", DTYPES, ending)
    assert caught.value.key == records[3].record.key


def test_a_long_common_prefix_changes_no_certificate(written: tuple[BaseModel, list[EncodedRecord]]) -> None:
    loaded, records = written
    prefix = [5, 6] * SHARED_PREFIX_TOKENS
    longer = [encoded([*prefix, *record.prompt_ids], record.answer_ids) for record in records]
    found = examine(loaded.model, longer)
    for record, probability in zip(longer, found.min_probs, strict=True):
        alone = examine(loaded.model, [record])
        assert alone.min_probs[0] == pytest.approx(probability, abs=1e-5)


def other_token(record: EncodedRecord, place: int) -> EncodedRecord:
    """The record with another token at one place of its answer."""
    answer = list(record.answer_ids)
    answer[place] = answer[place] + 1
    return encoded(record.prompt_ids, answer)


@pytest.mark.parametrize("place", [0, 2, -2])
def test_a_value_that_is_wrong_at_one_token_is_refused(
    written: tuple[BaseModel, list[EncodedRecord]], place: int
) -> None:
    loaded, records = written
    wrong = [*records[:2], other_token(records[2], place), *records[3:]]
    assert examine(loaded.model, wrong).wrong == {2: "by length"}
    with pytest.raises(RecallError, match="does not decode 'k' exactly in float32"):
        prove(loaded.model, wrong, "a", DTYPES)
    with pytest.raises(RecallError, match="alone"):
        prove_alone(loaded.model, wrong, "a", DTYPES)
    prove_alone(loaded.model, records, "a", DTYPES)


def test_free_running_decoding_decides_though_every_draft_stands(
    written: tuple[BaseModel, list[EncodedRecord]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token of the cached path that is off sends all that follow astray; teacher forcing does not see it."""
    loaded, records = written

    def decode(model: PreTrainedModel, *arguments: object) -> Iterator[tuple[int, list[int]]]:
        for index, ids in decoded(model, *arguments):  # type: ignore[arg-type]
            yield index, [*ids[:2], 7, *ids[3:]] if index == 3 else ids

    decoded = certificate.decode_records
    monkeypatch.setattr(certificate, "decode_records", decode)
    found = examine(loaded.model, records)
    assert found.wrong == {3: "by length"}
    assert min(found.min_probs) >= 0.6
    with pytest.raises(RecallError, match="by length") as caught:
        prove(loaded.model, records, "a", DTYPES)
    assert caught.value.key == records[3].record.key


def test_a_draft_that_does_not_stand_is_refused_though_free_running_decoding_is_right(
    written: tuple[BaseModel, list[EncodedRecord]], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, records = written

    def logits(model: PreTrainedModel, batch: object) -> Tensor:
        found = answer_logits(model, batch).clone()  # type: ignore[arg-type]
        found[1, 9] = found[1].max() + 0.01  # the second token of whichever record is first
        return found

    answer_logits = certificate.answer_logits
    monkeypatch.setattr(certificate, "answer_logits", logits)
    first = shuffled(records, PASS_RECORDS, PASS_TOKENS)[0][0]
    assert examine(loaded.model, records).wrong == {first: "shuffled, the value as a draft"}
    with pytest.raises(RecallError, match="the value as a draft"):
        prove(loaded.model, records, "a", DTYPES)


def test_an_end_token_that_does_not_come_is_refused(written: tuple[BaseModel, list[EncodedRecord]]) -> None:
    loaded, records = written
    cut = [encoded(record.prompt_ids, [*record.answer_ids[:2], record.answer_ids[-1]]) for record in records]
    assert set(examine(loaded.model, cut).wrong) == set(range(len(records)))


@given(st.lists(st.integers(2, 1500), min_size=1, max_size=200))
def test_drafts_cover_every_record_once_within_the_limits(lengths: list[int]) -> None:
    records = [of_length(length) for length in lengths]
    batches = shuffled(records, PASS_RECORDS, PASS_TOKENS)
    assert sorted(index for batch in batches for index in batch) == list(range(len(records)))
    assert batches == shuffled(records, PASS_RECORDS, PASS_TOKENS)
    for batch in batches:
        assert len(batch) <= PASS_RECORDS
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= PASS_TOKENS


def test_drafts_are_of_another_composition_than_free_running() -> None:
    records = [of_length(5 + number % 7) for number in range(200)]
    drafts = shuffled(records, PASS_RECORDS, PASS_TOKENS)
    assert [len(batch) for batch in drafts] == [PASS_RECORDS] * 3 + [200 - 3 * PASS_RECORDS]
    assert [index for batch in drafts for index in batch] != sorted(range(200), key=lambda i: lengths(records)[i])


def lengths(records: Sequence[EncodedRecord]) -> list[int]:
    return [record.total_tokens for record in records]


def test_the_least_certain_come_lowest_first_and_ties_in_order() -> None:
    assert least_certain([0.9, 0.7, 0.8, 0.7], 3) == [1, 3, 2]
    assert least_certain([0.9], 3) == [0]
    assert len(least_certain([0.5] * 40)) == ALONE


def test_the_least_certain_decodings_of_a_write_over_all_dtypes_are_repeated_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proofs, alone = dict[tuple[str, str], float](), list[tuple[str, str]]()

    def proving(
        model: PreTrainedModel,
        records: Sequence[EncodedRecord],
        adapter: str,
        dtypes: dict[str, str],
        ending: Ending | None,
    ) -> Proof:
        proof = prove(model, records, adapter, dtypes, ending)
        assert {str(model.dtype)} == {f"torch.{dtypes['base']}"}
        proofs.update(
            {(record.record.key, dtypes["base"]): prob for record, prob in zip(records, proof.min_probs, strict=True)}
        )
        return proof

    def proving_alone(model: PreTrainedModel, records: Sequence[EncodedRecord], adapter: str, dtypes: dict[str, str]):
        assert {str(model.dtype)} == {f"torch.{dtypes['base']}"}
        alone.extend((record.record.key, dtypes["base"]) for record in records)
        prove_alone(model, records, adapter, dtypes)

    monkeypatch.setattr("loramem.training.shards.prove", proving)
    monkeypatch.setattr("loramem.store.written.prove_alone", proving_alone)
    with MemoryStore(tmp_path / "m", str(base)) as store:
        store.write(numbers(12, 2))
    assert len(proofs) == 24
    assert {dtype for _, dtype in proofs} == {"float32", "bfloat16"}
    assert len(alone) == len(set(alone)) == ALONE
    assert max(proofs[one] for one in alone) <= min(prob for one, prob in proofs.items() if one not in alone)


def test_a_record_that_its_proof_decoded_alone_is_decoded_free_running_once_per_dtype(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, misrecalled = list[tuple[torch.dtype, list[list[int]]]](), certificate.misrecalled

    def noted(model: PreTrainedModel, records: Sequence[EncodedRecord], batches: list[list[int]]) -> Iterator[int]:
        decoded.append((model.dtype, batches))
        return misrecalled(model, records, batches)

    monkeypatch.setattr(certificate, "misrecalled", noted)
    with MemoryStore(tmp_path / "m", str(base)) as store:
        store.write(numbers(1))
    assert decoded == [(torch.bfloat16, [[0]]), (torch.float32, [[0]])]


def test_a_shard_that_is_refused_alone_is_trained_again_and_the_others_are_not(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    trained, refused = list[tuple[str, float]](), list[str]()

    def training(
        adapted: AdaptedModel,
        name: str,
        records: Sequence[EncodedRecord],
        *rest: Any,
        caution: float,
        **named: Any,
    ) -> ShardTraining:
        trained.append((records[0].record.namespace, caution))
        return train_shard(adapted, name, records, *rest, caution=caution, **named)

    def proving_alone(model: PreTrainedModel, records: Sequence[EncodedRecord], adapter: str, dtypes: dict[str, str]):
        if records[0].record.namespace == "b" and not refused:
            refused.append(adapter)
            raise RecallError("not alone: a key", key=records[0].record.key, adapter=adapter)
        prove_alone(model, records, adapter, dtypes)

    monkeypatch.setattr(shards, "train_shard", training)
    monkeypatch.setattr("loramem.store.written.prove_alone", proving_alone)
    records = [Record(key, value, space) for space in "ab" for key, value in numbers(3, 2).items()]
    with MemoryStore(tmp_path / "m", str(base)) as store:
        store.write(records)
        assert trained == [("a", CAUTION[0]), ("b", CAUTION[0]), ("b", CAUTION[-1])]
        assert not {adapter.id for adapter in store.adapters()} & set(refused)
        assert "its shard is trained again" in caplog.text and "a key" not in caplog.text
        assert [store.namespace(space).recall("key 1") for space in "ab"] == [numbers(3, 2)["key 1"]] * 2


def test_a_record_that_does_not_come_back_alone_with_all_caution_ends_the_write(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def misrecalled(model: PreTrainedModel, records: object, batches: Sequence[Sequence[int]]) -> Iterator[int]:
        if all(len(batch) == 1 for batch in batches) and model.dtype == torch.bfloat16:
            yield 0

    monkeypatch.setattr(certificate, "misrecalled", misrecalled)
    with MemoryStore(tmp_path / "m", str(base)) as store:
        with pytest.raises(RecallError, match=r"exactly in bfloat16 \(alone\)"):
            store.write(numbers(3, 2))
        assert len(list(store.records())) == 0
