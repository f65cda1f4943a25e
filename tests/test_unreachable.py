"""Tokens whose rows of the head are equal are found in every dtype, wherever they stand; only the losers, by bias."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from loramem.models import unreachable
from loramem.models.unreachable import unreachable_tokens


def found(rows: Tensor, bias: Tensor | None = None) -> list[int]:
    head = nn.Linear(rows.shape[1], len(rows), bias=bias is not None, dtype=rows.dtype)
    head.weight = nn.Parameter(rows)
    if bias is not None:
        head.bias = nn.Parameter(bias.to(rows.dtype))
    return sorted(unreachable_tokens(SimpleNamespace(get_output_embeddings=lambda: head)))  # type: ignore[arg-type]


def random_rows(count: int, width: int = 64, seed: int = 0) -> Tensor:
    return 0.02 * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def scattered(count: int, of: int) -> list[int]:
    return sorted(torch.randperm(of, generator=torch.Generator().manual_seed(1))[:count].tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 1000])
def test_twenty_pairs_of_equal_rows_are_found(dtype: torch.dtype, width: int) -> None:
    rows, ids = random_rows(5000, width), scattered(40, 5000)
    rows[ids[1::2]] = rows[ids[::2]]
    assert found(rows.to(dtype)) == ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_within_the_tolerance_are_found_among_others_and_those_beyond_are_not(dtype: torch.dtype) -> None:
    rows, ids = random_rows(20_000), scattered(400, 20_000)
    noise = random_rows(200, seed=2)
    noise *= 0.003 * rows[ids[::2]].norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    rows[ids[1::2]] = rows[ids[::2]] + noise
    assert found(rows.to(dtype)) == ids
    rows[ids[1::2]] = rows[ids[::2]] + 4 * noise
    assert found(rows.to(dtype)) == []


def test_rows_that_share_a_direction_are_told_apart() -> None:
    rows = random_rows(2000) * 0.1 + random_rows(1, seed=3)
    rows[7] = rows[1234]
    rows[9] = 1.1 * rows[10]
    assert found(rows.bfloat16()) == [7, 1234]


@pytest.mark.parametrize("size", [0.0, 1e-12], ids=["zero", "nearly zero"])
def test_rows_of_zeros_are_equal_and_one_alone_is_not(size: float) -> None:
    rows = random_rows(300)
    rows[[3, 50, 299]] = size * random_rows(3, seed=4)
    assert found(rows.bfloat16()) == [3, 50, 299]
    rows[[3, 299]] = random_rows(2, seed=5)
    assert found(rows.bfloat16()) == []
    assert found(torch.zeros(4, 8)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("biases", "losers"),
    [
        ((0.0, 0.0), (0, 1)),
        ((0.0, 2.0), (0,)),
        ((2.0, 0.0, 1.0), (1, 2)),
        ((0.25, 0.0, 0.0), (0, 1, 2)),  # the first wins, with p = 0.39
        ((1.0, 0.0, 0.0), (1, 2)),  # p = 0.58
        ((1000.0, 0.0, 1000.0), (0, 1, 2)),
    ],
)
def test_of_equal_rows_with_biases_those_that_lose_are_unreachable(
    biases: tuple[float, ...], losers: tuple[int, ...]
) -> None:
    rows, bias, ids = random_rows(500), torch.zeros(500), scattered(len(biases), 500)
    rows[ids], bias[ids] = rows[ids[0]].clone(), torch.tensor(biases)
    assert found(rows.bfloat16(), bias) == [ids[place] for place in losers]


def test_thousands_of_equal_rows_are_few_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def distances(rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
        compared.append(len(first))
        return real(rows, first, second)

    real = unreachable._distances
    monkeypatch.setattr(unreachable, "_distances", distances)
    rows = random_rows(8000)
    rows[3000:6000] = 0
    assert found(rows.bfloat16()) == list(range(3000, 6000))
    assert sum(compared) < 4000


def test_the_head_is_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(1000)
    rows[999] = rows[0]
    monkeypatch.setattr(unreachable, "CHUNK", 640)
    assert found(rows.half()) == [0, 999]
