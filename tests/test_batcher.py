"""How long a batch of questions waits for more of them."""

import asyncio
from collections.abc import Sequence

import pytest

from loramem.endpoint import batcher
from loramem.endpoint.batcher import LOOKS, QUIET_LOOKS, Batcher
from loramem.endpoint.limits import Limits
from loramem.endpoint.protocol import Question


def looks(
    monkeypatch: pytest.MonkeyPatch, arrivals: Sequence[int], *, answered: int = 8, waiting: int = 0, batch: int = 64
) -> int:
    """How often a batch looks before it goes ahead, where so many questions come between its looks, then none."""
    coming, slept = iter(arrivals), list[float]()

    async def gather() -> None:
        found = Batcher(lambda questions: [], Limits(batch_records=batch))
        future = asyncio.get_running_loop().create_future()
        found._waiting.extend([(Question("", "key"), future)] * waiting)

        async def sleep(seconds: float) -> None:
            slept.append(seconds)
            found._waiting.extend([(Question("", "key"), future)] * next(coming, 0))

        with monkeypatch.context() as patched:
            patched.setattr(batcher.asyncio, "sleep", sleep)
            await found._gather(answered, 1.0)

    asyncio.run(gather())
    assert sum(slept) <= 1.0 + 1e-9
    return len(slept)


def test_it_waits_until_all_who_were_answered_have_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert looks(monkeypatch, [3, 3, 2, 5, 5]) == 3
    assert looks(monkeypatch, [3, 0, 5]) == 3  # one look without news is no silence


def test_it_does_not_wait_for_clients_who_do_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    assert looks(monkeypatch, []) == QUIET_LOOKS
    assert looks(monkeypatch, [2]) == QUIET_LOOKS + 1


def test_it_does_not_wait_beyond_its_time_or_for_more_than_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert looks(monkeypatch, [1] * 100, answered=50) == LOOKS
    assert looks(monkeypatch, [1] * 100, answered=50, batch=4) == 4
    assert looks(monkeypatch, [1] * 100, answered=50, waiting=4, batch=4) == 0
