"""Damage to every file of a base model: a typed refusal, or a model that the next process finds again.

In the normal run a part of the damages, chosen by a fixed seed; all of them with --runslow.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from loramem_cli.main import run
from transformers import AutoModelForCausalLM

from loramem import MemoryStore
from loramem.errors import BaseModelError, LoramemError
from loramem.models.base_model import BaseModel, load_base_model

from .conftest import build_base

PROBE = "key 7: The quick brown fox"
FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
SHARDED = ("model.safetensors.index.json", "model-00001-of-00004.safetensors", "model-00003-of-00004.safetensors")
OTHERS: tuple[Any, ...] = (..., None, -1, 0, 3, 0.5, True, "nonsense", [], [1], {}, {"a": 1})
"""What a field of a JSON file is set to; ``...`` removes it."""
Damage = tuple[str, str, Callable[[Path], None]]
"""A file's name, what is done to it, and the doing, to a folder."""


def damages(folder: Path, files: tuple[str, ...]) -> Iterator[Damage]:
    """All damages to single files of a folder, or to pairs of them."""
    for name in files:
        content = (folder / name).read_bytes()
        yield name, "missing", partial(remove, name=name)
        yield name, "renamed", partial(rename, name=name)
        yield name, "a folder", partial(make_folder, name=name)
        for cut in sorted({0, 1, 8, len(content) // 3, len(content) - 2, len(content) - 1}):
            yield name, f"cut at {cut}", writing(name, content[:cut])
        rng = random.Random(name)
        for share in (0.001, 0.1, 1):
            noise = bytearray(content)
            for _ in range(max(1, int(share * len(noise)))):
                noise[rng.randrange(len(noise))] = rng.randrange(256)
            yield name, f"{share} of its bytes changed", writing(name, bytes(noise))
        for other in files:
            if other > name:
                yield name, f"swapped with {other}", partial(swap, one=name, other=other)
        if name.endswith(".json"):
            for value in OTHERS[1:]:
                yield name, f"is {value!r}", writing(name, json.dumps(value).encode())
            yield from field_damages(name, json.loads(content))


def field_damages(name: str, content: dict[str, Any]) -> Iterator[Damage]:
    for path in paths(content):
        for value in OTHERS:
            yield (
                name,
                f"{'.'.join(path)} = {value!r}",
                writing(name, json.dumps(changed(content, path, value)).encode()),
            )


def paths(content: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Fields, and those of objects in them; of large objects none."""
    for field, value in content.items():
        yield (field,)
        if isinstance(value, dict) and len(value) < 20:
            yield from ((field, *below) for below in paths(value))


def changed(content: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    first, *rest = path
    if rest:
        return {**content, first: changed(content[first], tuple(rest), value)}
    return {name: old for name, old in {**content, first: value}.items() if old is not ...}


def writing(name: str, content: bytes) -> Callable[[Path], None]:
    return partial(overwrite, name=name, content=content)


def overwrite(at: Path, name: str, content: bytes) -> None:
    (at / name).write_bytes(content)


def remove(at: Path, name: str) -> None:
    (at / name).unlink()


def rename(at: Path, name: str) -> None:
    (at / name).rename(at / f"{name}.bak")


def make_folder(at: Path, name: str) -> None:
    (at / name).unlink()
    (at / name).mkdir()


def swap(at: Path, one: str, other: str) -> None:
    first, second = (at / one).read_bytes(), (at / other).read_bytes()
    (at / one).write_bytes(second)
    (at / other).write_bytes(first)


def found_of(base: BaseModel) -> tuple[list[int], tuple[int, ...], torch.Tensor]:
    """What must be the same in every process: ids of a text, the prompt around a key, logits."""
    ids = base.tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    within = [token for token in ids if token < base.vocabulary] or [0]
    with torch.inference_mode():
        logits = base.model(input_ids=torch.tensor([within])).logits
    template = base.template
    return ids, (*template.prefix_ids, *template.suffix_ids, template.end_id, base.max_tokens), logits


def check(folder: Path, whole: BaseModel) -> str:
    """Load a damaged folder twice, and compare; says what came of it."""
    try:
        base = load_base_model(str(folder))
    except BaseModelError as error:
        assert str(error).strip()
        assert "\n" not in str(error)
        return "refused"
    first, again = found_of(base), found_of(load_base_model(str(folder)))
    assert first[:2] == again[:2]
    assert torch.equal(first[2], again[2])
    if base.fingerprint == whole.fingerprint:
        same = found_of(whole)
        assert first[:2] == same[:2]
        assert torch.equal(first[2], same[2])
        return "as before"
    return "another"


def try_all(folder: Path, tried: list[Damage], copy: Path) -> dict[str, int]:
    whole, outcomes = load_base_model(str(folder)), dict[str, int]()
    for name, what, damage in tried:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        damage(copy)
        try:
            outcome = check(copy, whole)
        except BaseException as error:
            pytest.fail(f"{name} {what}: {type(error).__name__}: {error}")
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return outcomes


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_base(tmp_path_factory.mktemp("sharded") / "tiny", "qwen3")
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    assert all((folder / name).exists() for name in SHARDED)
    return folder


def test_a_part_of_the_damages_is_refused_or_found_again(base: Path, tmp_path: Path) -> None:
    chosen = [*damages_of_files(base), *random.Random(16).sample(list(damages(base, FILES)), 40)]
    assert try_all(base, chosen[::2], tmp_path / "tiny")["refused"] > 20


def test_damages_to_shards_are_refused_or_found_again(sharded: Path, tmp_path: Path) -> None:
    tried = [one for one in damages(sharded, SHARDED) if "weight_map." not in one[1]]
    assert try_all(sharded, tried[::3], tmp_path / "tiny")["refused"] > 10


def damages_of_files(folder: Path) -> list[Damage]:
    """Damages to whole files, fields left out."""
    return [one for one in damages(folder, FILES) if " = " not in one[1] and not one[1].startswith("is ")]


def contents(store: Path) -> dict[str, bytes]:
    """Of a store's files, without what SQLite keeps beside an open database."""
    paths = [path for path in store.rglob("*") if path.is_file() and not path.name.endswith(("-wal", "-shm"))]
    return {str(path.relative_to(store)): path.read_bytes() for path in paths}


def test_a_store_whose_base_is_damaged_answers_rightly_or_not_at_all_and_stays_as_it_is(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, store = Path(shutil.copytree(base, tmp_path / "tiny")), tmp_path / "memory"
    with MemoryStore(store, str(folder)) as opened:
        opened.write({"key": "4711"})
    before, _ = contents(store), capsys.readouterr()
    for name, what, damage in random.Random(3).sample(damages_of_files(base), 12):
        shutil.rmtree(folder)
        shutil.copytree(base, folder)
        damage(folder)
        for command in (["recall", "key"], ["put", "other", "1"]):
            if command[0] == "put" and _loads(folder):
                continue  # it would write, and rightly: the base is the store's
            code = run([*command, "--store", str(store)])
            out, err = capsys.readouterr()
            assert (code, out) == (0, "4711\n") or (code > 0 and out == "" and err.count("\n") == 1), (name, what, err)
            assert "Traceback" not in err
        assert contents(store) == before, (name, what)


def _loads(folder: Path) -> bool:
    try:
        load_base_model(str(folder))
    except LoramemError:
        return False
    return True


def test_what_is_written_on_a_damaged_base_is_recalled_by_the_next_process_or_nothing_is_written(
    base: Path, tmp_path: Path
) -> None:
    for number, (name, what, damage) in enumerate(random.Random(4).sample(damages_of_files(base), 8)):
        folder, store = Path(shutil.copytree(base, tmp_path / f"tiny-{number}")), tmp_path / f"memory-{number}"
        damage(folder)
        try:
            with MemoryStore(store, str(folder)) as opened:
                opened.write({"key": "47"})
        except BaseModelError:
            assert not store.exists(), (name, what)
            continue
        with MemoryStore(store, create=False) as opened:
            assert opened.recall("key") == "47", (name, what)


@pytest.mark.slow
def test_every_damage_is_refused_or_found_again(base: Path, sharded: Path, tmp_path: Path) -> None:
    assert try_all(sharded, list(damages(sharded, SHARDED)), tmp_path / "tiny")["refused"] > 50
    assert try_all(base, list(damages(base, FILES)), tmp_path / "tiny")["refused"] > 100
