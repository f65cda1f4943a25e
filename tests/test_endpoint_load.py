"""Sixty-four clients of many adapters at once, while another process writes, deletes and compacts: no wrong answer."""

import random
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from loramem import MemoryStore
from loramem.endpoint.backends import OwnModel
from loramem.endpoint.limits import Limits
from loramem.index.lock import write_lock

from .conftest import ROOT, numbers
from .serving_threads import serving

CLIENTS = 64
CHANGES = """
import sys
from loramem import MemoryStore
with MemoryStore(sys.argv[1], create=False) as store:
    store.write({f"new {i}": f"{i:04d}" for i in range(4)})
    store.delete(["gone 0", "gone 1"])
    store.write({"key 0": "9999"}, on_conflict="replace")
    store.compact(which="all")
    store.gc(grace_s=0)
"""


def test_no_answer_is_wrong_while_the_store_changes(base: Path, tmp_path: Path) -> None:
    place, limits = tmp_path / "memory", Limits()
    records = numbers(12)
    allowed = {"key 0": {records.pop("key 0"), "9999"}} | {key: {value} for key, value in records.items()}
    with MemoryStore(place, str(base)) as store:
        for part in range(3):
            store.write({key: value for number, (key, value) in enumerate(records.items()) if number % 3 == part})
        store.write({"key 0": next(iter(allowed["key 0"] - {"9999"})), "gone 0": "1111", "gone 1": "2222"})
        allowed |= {"gone 0": {"1111", None}, "gone 1": {"2222", None}, "never": {None}}
        allowed |= {f"new {i}": {None, f"{i:04d}"} for i in range(4)}
        changed, lock, seen = threading.Event(), threading.Lock(), Counter[tuple[str, str | None]]()

        def client(number: int) -> None:
            rng, after = random.Random(number), 0
            while after < 3:  # and a few once everything has changed
                after += changed.is_set()
                key = rng.choice(list(allowed))
                try:
                    value = recall(shared, key)
                except openai.NotFoundError:
                    value = None
                with lock:
                    seen[key, value] += 1
                changed.wait(2 * rng.random())  # so that the one who changes things gets his turn

        with (
            serving(OwnModel(store, limits), limits) as url,
            openai.OpenAI(base_url=url, api_key="unused", max_retries=0) as shared,
            ThreadPoolExecutor(CLIENTS) as pool,
        ):
            clients = [pool.submit(client, number) for number in range(CLIENTS)]
            try:
                done = subprocess.run([sys.executable, "-c", CHANGES, str(place)], cwd=ROOT, capture_output=True)
            finally:
                changed.set()
            assert done.returncode == 0, done.stderr
            for each in clients:
                each.result()
            assert recall(shared, "key 0") == "9999" and recall(shared, "new 3") == "0003"
            with pytest.raises(openai.NotFoundError):
                recall(shared, "gone 0")
        wrong = {answer: count for answer, count in seen.items() if answer[1] not in allowed[answer[0]]}
        assert not wrong and sum(seen.values()) >= 3 * CLIENTS


def recall(client: openai.OpenAI, key: str) -> str | None:
    turns = [{"role": "user", "content": key}]
    return client.chat.completions.create(model="loramem", messages=turns).choices[0].message.content


def test_the_endpoint_answers_while_another_process_holds_the_lock(base: Path, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        store.write({"a:": "0417"})
        with (
            write_lock(store.path),
            serving(OwnModel(store, Limits()), Limits()) as url,
            openai.OpenAI(base_url=url, api_key="unused", max_retries=0) as client,
        ):
            assert recall(client, "a:") == "0417"
