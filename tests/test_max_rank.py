"""The highest rank is one number, the settings', which every way to write or plan follows."""

import json
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from loramem_cli.main import cli, run

from loramem import MemoryStore, WriterSettings
from loramem.planning.limits import RankLimits
from loramem.training.settings import MAX_RANK

HIGH = WriterSettings(max_rank=256)
WRITES: dict[str, Callable[[MemoryStore, WriterSettings | None], object]] = {
    "write": lambda store, settings: store.write({"other": "1"}, rank=200, settings=settings),
    "update": lambda store, settings: store.update("k", "2", rank=200, settings=settings),
    "rename": lambda store, settings: store.rename("k", "new", rank=200, settings=settings),
}


@pytest.fixture
def store(base: Path, tmp_path: Path) -> MemoryStore:
    return MemoryStore(tmp_path / "memory", str(base))


def test_a_rank_that_the_settings_allow_is_written_changed_and_written_anew(store: MemoryStore) -> None:
    assert store.write({"k": "42"}, rank=200, settings=HIGH).rank == 200
    store.update("k", "43", rank=201, settings=HIGH)
    store.rename("k", "new", rank=202, settings=HIGH)
    store.write({"b": "7"}, rank=202, settings=HIGH)
    store.compact(which="all")
    assert {adapter.rank for adapter in store.adapters()} == {202}
    assert store.plan({"c": "1"}, rank=200, limits=RankLimits(256)).shards[0].rank == 200


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_higher_one_is_refused_with_the_remedy(
    write: Callable[[MemoryStore, WriterSettings | None], object], store: MemoryStore
) -> None:
    for settings in (None, WriterSettings(max_rank=128), WriterSettings(max_rank=199)):
        highest = MAX_RANK if settings is None else settings.max_rank
        with pytest.raises(ValueError, match=f"between 1 and {highest}, not 200.*max_rank=200 .--max-rank 200"):
            write(store, settings)
        assert (store.pending(), store.namespaces()) == (None, [])
    with pytest.raises(ValueError, match="max_rank must be at least 1, not 0"):
        WriterSettings(max_rank=0)


def test_one_number_is_the_default_everywhere() -> None:
    assert WriterSettings().max_rank == RankLimits().highest == MAX_RANK
    commands = ("write", "put", "update", "rename", "capacity")
    options = [next(p for p in cli.commands[name].params if p.name == "max_rank") for name in commands]
    assert {option.get_default(click.Context(cli)) for option in options} == {MAX_RANK}


@pytest.mark.parametrize(
    "arguments", ["put k 42", "update k 42", "rename k new", "write {file}", "capacity --length 10"]
)
def test_the_command_line_names_the_option_that_allows_it(arguments: str, base: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file.jsonl").write_text('{"key": "k", "value": "42"}\n')
    store = ["--store", str(tmp_path / "memory"), "--model", str(base), "--rank", "200"]
    assert run([*arguments.format(file=tmp_path / "file.jsonl").split(), *store]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].endswith(
        "rank must be between 1 and 128, not 200. Give a lower one, or allow it with max_rank=200 (--max-rank 200)."
    )
    assert not (tmp_path / "memory").exists()


def test_the_command_line_allows_it(base: Path, tmp_path: Path, capsys) -> None:
    store = ["--store", str(tmp_path / "memory"), "--model", str(base), "--rank", "200", "--max-rank", "200"]
    assert run(["put", "k", "42", *store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rank"] == 200
