"""How long a batch of questions waits for more of them."""

import asyncio
from collections.abc import Sequence

import pytest

from loramem.endpoint import batcher
from loramem.endpoint.batcher import LOOKS, QUIET_LOOKS, Batcher
from loramem.endpoint.limits import Limits
from loramem.endpoint.protocol import Question
from loramem.results import Recall


def looks(monkeypatch: pytest.MonkeyPatch, arrivals: Sequence[int], *, wanted: int = 9, waiting: int = 1) -> int:
    """How often a batch looks before it goes ahead, where so many questions come between its looks, then none."""
    coming, slept = iter(arrivals), list[float]()

    async def gather() -> None:
        found = Batcher(lambda questions: [], Limits())
        future = asyncio.get_running_loop().create_future()
        found._waiting.extend([(Question("", "key"), future)] * waiting)

        async def sleep(seconds: float) -> None:
            slept.append(seconds)
            found._waiting.extend([(Question("", "key"), future)] * next(coming, 0))

        with monkeypatch.context() as patched:
            patched.setattr(batcher.asyncio, "sleep", sleep)
            await found._gather(wanted, 1.0)

    asyncio.run(gather())
    assert sum(slept) <= 1.0 + 1e-9
    return len(slept)


def test_it_waits_until_all_who_were_answered_have_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert looks(monkeypatch, [3, 3, 2, 5, 5]) == 3
    assert looks(monkeypatch, [3, 0, 5]) == 3  # one look without news is no silence


def test_it_does_not_wait_for_clients_who_do_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    assert looks(monkeypatch, []) == QUIET_LOOKS
    assert looks(monkeypatch, [2]) == QUIET_LOOKS + 1


def test_it_does_not_wait_beyond_its_time_or_without_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    assert looks(monkeypatch, [1] * 100, wanted=50) == LOOKS
    assert looks(monkeypatch, [1] * 100, waiting=0) == 0
    assert looks(monkeypatch, [1] * 100, wanted=1) == 0


def test_a_batch_waits_for_as_many_as_the_one_before_and_a_lone_client_for_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked, answer = list[tuple[int, int]](), Recall("key", "value", 0.9, "adapter", 1, 1)

    async def gather(found: Batcher, wanted: int, _: float) -> None:
        if found._waiting:
            looked.append((wanted, len(found._waiting)))

    async def ask() -> None:
        found = Batcher(lambda questions: [answer] * len(questions), Limits(batch_records=3))
        running = asyncio.create_task(found.run())
        for together in (3, 1, 1, 5):
            await asyncio.gather(*(found.ask(Question("", "key")) for _ in range(together)))
        running.cancel()

    monkeypatch.setattr(Batcher, "_gather", gather)
    asyncio.run(ask())
    assert looked == [(1, 3), (3, 1), (1, 1), (1, 5), (3, 2)]
