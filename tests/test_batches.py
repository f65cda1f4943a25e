"""Padded batches say the same as each record alone, and every record goes into exactly one batch."""

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel, Qwen3Config

from loramem.models.batches import (
    Batch,
    answer_logits,
    group_by_length,
    make_batch,
    pad_left,
    per_position,
    token_losses,
)
from loramem.records.prompts import EncodedRecord
from loramem.records.record import Record


def encoded(prompt: Sequence[int], answer: Sequence[int]) -> EncodedRecord:
    return EncodedRecord(Record("k", "v"), tuple(prompt), tuple(answer))


def of_length(total: int) -> EncodedRecord:
    return encoded([1] * (total - 2), [2, 3])


RAGGED = [encoded([11, 12, 13], [21, 2]), encoded([14], [22, 23, 24, 2]), encoded([15, 16, 17, 18], [25, 26, 2])]


# --- padding


def test_rows_are_padded_with_zeros_on_the_left() -> None:
    ids, mask = pad_left([[5, 6, 7], [8], [9, 4]])
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8], [0, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.int64)


def test_a_token_with_id_zero_is_not_padding() -> None:
    ids, mask = pad_left([[0, 5], [0, 0, 6]])
    assert ids.tolist() == [[0, 0, 5], [0, 0, 6]]
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1]]


def test_answers_of_a_batch_end_in_its_last_column() -> None:
    batch = make_batch(RAGGED, "cpu")
    assert batch.input_ids.shape == (3, 7)
    assert batch.input_ids.tolist() == [
        [0, 0, 11, 12, 13, 21, 2],
        [0, 0, 14, 22, 23, 24, 2],
        [15, 16, 17, 18, 25, 26, 2],
    ]
    assert batch.targets.tolist() == [[0, 0, 21, 2], [22, 23, 24, 2], [0, 25, 26, 2]]
    assert torch.equal(batch.targets[batch.supervised], batch.input_ids[:, -4:][batch.supervised])


def test_answer_and_end_token_are_supervised_and_nothing_else() -> None:
    batch = make_batch(RAGGED, "cpu")
    assert batch.supervised.dtype == torch.bool
    assert batch.supervised.int().tolist() == [[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]


def test_positions_count_from_the_first_real_token() -> None:
    batch = make_batch(RAGGED, "cpu")
    assert batch.position_ids.tolist() == [[0, 0, 0, 1, 2, 3, 4], [0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]]


def test_the_attention_mask_hides_padding() -> None:
    batch = make_batch(RAGGED, "cpu")
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1], [1] * 7]


def test_there_is_no_attention_mask_when_nothing_is_padded() -> None:
    batch = make_batch([encoded([1, 2, 3], [4, 5]), encoded([6, 7], [8, 9, 5])], "cpu")
    assert batch.attention_mask is None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert batch.supervised.int().tolist() == [[0, 1, 1], [1, 1, 1]]  # answers may differ in length all the same


# --- losses


def test_the_loss_of_a_token_is_its_surprise_in_nats_and_zero_where_nothing_is_supervised() -> None:
    logits = torch.tensor([[math.log(9), 0.0], [0.0, math.log(3)], [0.0, 0.0], [math.log(4), 0.0], [0.0, math.log(7)]])
    batch = Batch(
        input_ids=torch.zeros(2, 3, dtype=torch.long),
        attention_mask=None,
        position_ids=torch.arange(3).repeat(2, 1),
        targets=torch.tensor([[0, 0, 1], [0, 1, 1]]),
        supervised=torch.tensor([[True, True, True], [False, True, True]]),
    )
    # p(target) = 9/10, 1/4, 1/2; not supervised, 1/5, 7/8
    expected = [[-math.log(0.9), math.log(4), math.log(2)], [0.0, math.log(5), math.log(8 / 7)]]
    torch.testing.assert_close(token_losses(logits, batch), torch.tensor(expected))


def test_values_of_supervised_positions_go_to_their_places() -> None:
    batch = make_batch(RAGGED, "cpu")
    placed = per_position(torch.arange(1.0, 1 + int(batch.supervised.sum())), batch)
    assert torch.equal(placed > 0, batch.supervised)
    assert placed[batch.supervised].tolist() == list(range(1, 1 + int(batch.supervised.sum())))


# --- logits


SPREAD = 0.3  # of the random weights: at the default of 0.02 all positions give nearly the same logits
QWEN3 = Qwen3Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    initializer_range=SPREAD,
)
# Qwen3 knows distances between tokens only; GPT-2 shows a position that counts from the wrong token.
GPT2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=SPREAD)


@pytest.fixture(scope="module", params=[QWEN3, GPT2], ids=["qwen3", "gpt2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(request.param, dtype=torch.float32).eval()


def full_logits(model: PreTrainedModel, record: EncodedRecord) -> torch.Tensor:
    """Logits of each answer position of one record, from the plain call: position t predicts token t + 1."""
    ids = torch.tensor([[*record.prompt_ids, *record.answer_ids]])
    first = len(record.prompt_ids) - 1
    return model(ids).logits[0, first : first + len(record.answer_ids)]


@torch.no_grad()
def test_a_padded_batch_gives_the_logits_of_each_record_alone(model: PreTrainedModel) -> None:
    batch = make_batch(RAGGED, "cpu")
    together = answer_logits(model, batch).split([len(record.answer_ids) for record in RAGGED])
    for mine, record in zip(together, RAGGED, strict=True):
        alone = full_logits(model, record)
        assert alone.std() > 0.1
        torch.testing.assert_close(mine, alone, atol=1e-4, rtol=0)
        torch.testing.assert_close(answer_logits(model, make_batch([record], "cpu")), alone, atol=1e-4, rtol=0)


@torch.no_grad()
def test_only_supervised_positions_reach_the_unembedding(model: PreTrainedModel) -> None:
    batch, seen = make_batch(RAGGED, "cpu"), []
    head = model.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(args[0].shape[0]))
    answer_logits(model, batch)
    head.remove()
    assert seen == [sum(len(record.answer_ids) for record in RAGGED)]


@torch.no_grad()
def test_a_batch_without_padding_gives_the_logits_of_each_record_alone(model: PreTrainedModel) -> None:
    records = [encoded([11, 12, 13], [21, 2]), encoded([14, 15], [22, 23, 2])]
    together = answer_logits(model, make_batch(records, "cpu")).split([2, 3])
    for mine, record in zip(together, records, strict=True):
        torch.testing.assert_close(mine, full_logits(model, record), atol=1e-4, rtol=0)


@torch.no_grad()
def test_logits_come_in_single_precision_from_a_model_in_half(model: PreTrainedModel) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert answer_logits(half, make_batch(RAGGED, "cpu")).dtype == torch.float32


# --- grouping


def test_batches_hold_records_of_similar_length() -> None:
    records = [of_length(total) for total in (9, 3, 8, 3, 4, 9)]
    assert group_by_length(records, range(6), batch_records=2, batch_tokens=1000) == [[1, 3], [4, 2], [0, 5]]


def test_ties_in_length_keep_the_given_order() -> None:
    records = [of_length(total) for total in (5, 5, 4, 5)]
    assert group_by_length(records, [3, 1, 2, 0], batch_records=10, batch_tokens=1000) == [[2, 3, 1, 0]]


def test_only_the_given_indices_are_used() -> None:
    assert group_by_length([of_length(4)] * 6, [4, 1], batch_records=8, batch_tokens=100) == [[4, 1]]
    assert group_by_length([of_length(4)] * 6, [], batch_records=8, batch_tokens=100) == []


def test_padding_counts_as_tokens_of_a_batch() -> None:
    records = [of_length(4), of_length(5), of_length(6)]
    assert group_by_length(records, range(3), batch_records=8, batch_tokens=18) == [[0, 1, 2]]  # 3 rows x 6 columns
    assert group_by_length(records, range(3), batch_records=8, batch_tokens=17) == [
        [0, 1],
        [2],
    ]  # though 4 + 5 + 6 < 17


def test_a_record_longer_than_a_batch_goes_alone() -> None:
    records = [of_length(4), of_length(50), of_length(4), of_length(60)]
    assert group_by_length(records, range(4), batch_records=8, batch_tokens=20) == [[0, 2], [1], [3]]


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30),
    batch_records=st.integers(1, 6),
    batch_tokens=st.integers(1, 120),
    data=st.data(),
)
def test_every_index_goes_into_one_batch_within_the_limits(
    lengths: list[int], batch_records: int, batch_tokens: int, data: st.DataObject
) -> None:
    records = [of_length(length) for length in lengths]
    order = data.draw(st.permutations(range(len(records)))) if len(records) < 8 else range(len(records))
    batches = group_by_length(records, order, batch_records, batch_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(records)))
    for batch in batches:
        assert 1 <= len(batch) <= batch_records
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= batch_tokens
    widths = [lengths[index] for batch in batches for index in batch]
    assert widths == sorted(widths)
