"""Single bits of a store flipped, one at a time: python -m tests.damage STORE FLIPS [SEED [ruin]]

Over adapter files, store.json and the columns of index rows, and now and then a whole row lost. With "ruin" files are
cut, zeroed in part or swapped instead, index.db too. The quick check must report every one, and no key may be answered
with another value than the one it was committed with. The store is put back as it was after each.
"""

import random
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from loramem import MemoryStore
from loramem.errors import LoramemError
from loramem.models.adapters import AdaptedModel

ASKED = 4  # keys after every flip
TABLES = ("records", "adapters", "versions", "retired", "writes", "journal", "publications", "meta")


def flipped(value: Any, rng: random.Random) -> Any:
    """A column's value with one bit changed, of the same type."""
    if isinstance(value, int):
        return value ^ 1 << rng.randrange(8)
    if isinstance(value, float):
        return value * (1 + 2 ** -rng.randint(1, 40))
    content = bytearray(str(value).encode())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(7)  # stays ASCII, if it was
    return content.decode(errors="replace")


Damage = Callable[[Path, list[Path], random.Random], str]
"""Changes a file, knowing the others, and says what it did."""


def flip(path: Path, _: list[Path], rng: random.Random) -> str:
    """Flip one bit of a file or of a row."""
    return damage_row(path, rng) if path.name == "index.db" else damage_file(path, rng)


def ruin(path: Path, others: list[Path], rng: random.Random) -> str:
    """Cut a file, zero a part of it, or put another in its place."""
    content = path.read_bytes()
    while True:
        way, at = rng.choice(["cut", "zeroed", "swapped"]), rng.randrange(len(content))
        if way == "cut":
            ruined = content[:at]
        elif way == "zeroed":
            ruined = content[:at] + bytes(min(rng.randint(1, 8192), len(content) - at))
            ruined += content[len(ruined) :]
        else:
            ruined = rng.choice(others).read_bytes()
        if ruined != content:
            path.write_bytes(ruined)
            return f"{path.name} {way} at {at}"


def contents(index: Path) -> list[list[Any]] | None:
    """All that a database says; None if it cannot be read, or its pages do not hang together."""
    with suppress(sqlite3.DatabaseError), closing(sqlite3.connect(f"{index.as_uri()}?immutable=1", uri=True)) as db:
        if db.execute("pragma integrity_check").fetchall() == [("ok",)]:
            return [db.execute(f"select * from {table} order by 1, 2").fetchall() for table in (*TABLES, "outcomes")]
    return None


def damage_row(index: Path, rng: random.Random) -> str:
    """Change one column of a row, or lose a row; says which."""
    with closing(sqlite3.connect(index)) as connection, connection:
        table = rng.choice([name for name in TABLES if connection.execute(f"select 1 from {name}").fetchone()])
        rows = connection.execute(f"select rowid, * from {table}")
        names = [column[0] for column in rows.description][1:]
        rowid, *values = rng.choice(rows.fetchall())
        if rng.random() < 0.1:
            connection.execute(f"delete from {table} where rowid = ?", [rowid])
            return f"{table} {rowid} lost"
        name, value = rng.choice([pair for pair in zip(names, values, strict=True) if pair[1] not in (None, "")])
        with suppress(sqlite3.IntegrityError):  # it became another row's key
            connection.execute(f'update {table} set "{name}" = ? where rowid = ?', [flipped(value, rng), rowid])
            return f"{table}.{name} of {rowid}"
    return damage_row(index, rng)


def damage_file(path: Path, rng: random.Random) -> str:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    bit = rng.randrange(len(content) * 8)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return f"{path.name} bit {bit}"


def reported(store: Path) -> bool:
    """Whether the quick check, or opening the store, says that something is wrong."""
    try:
        with MemoryStore(store, create=False) as opened:
            return not opened.verify(quick=True).ok
    except LoramemError:
        return True


def answers(store: Path, adapted: AdaptedModel, keys: Iterable[str]) -> dict[str, str]:
    """What recall gives for these keys, from disk; nothing for those that it refuses with an error of its own.

    Args:
        adapted: The base model, which would take longer to load anew than all the rest.
    """
    found: dict[str, str] = {}
    with suppress(LoramemError), MemoryStore(store, create=False) as opened:
        opened._session.base, opened._session.adapted = adapted.base, adapted
        for key in keys:
            with suppress(LoramemError):
                found[key] = opened.recall(key)
    for name in list(adapted._loaded):
        adapted.remove(name)
    return found


def main(store: Path, flips: int, seed: int = 0, how: Damage = flip) -> tuple[list[str], list[str]]:
    """What was damaged and not reported, and what was damaged and gave a wrong value."""
    rng, unseen, wrong = random.Random(seed), list[str](), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "memory"
        shutil.copytree(store, copy)
        assert not reported(copy)
        with MemoryStore(copy, create=False) as opened:
            live = [adapter.id for adapter in opened.adapters()]  # nothing is read from the retired ones
            adapted = opened._session.adapted
            committed = {recall.key: recall.value for recall in opened.recall_many()}
        assert answers(copy, adapted, committed) == committed
        rows = contents(copy / "index.db")
        assert rows is not None
        files = [path for adapter in live for path in (copy / "adapters" / adapter).iterdir()] + [copy / "store.json"]
        for _ in range(flips):
            target = rng.choice([*files, copy / "index.db"])
            before = target.read_bytes()
            what = how(target, files, rng)
            if not reported(copy) and (target.name != "index.db" or contents(target) != rows):
                unseen.append(what)
            asked = rng.sample(sorted(committed), k=min(ASKED, len(committed)))
            if any(committed[key] != value for key, value in answers(copy, adapted, asked).items()):
                wrong.append(what)
            for beside in copy.glob("index.db-*"):
                beside.unlink()
            target.write_bytes(before)
        assert not reported(copy)
        assert answers(copy, adapted, committed) == committed
    return unseen, wrong


if __name__ == "__main__":
    unseen, wrong = main(
        *(Path(sys.argv[1]), int(sys.argv[2]), int((sys.argv[3:] or ["0"])[0])), how=ruin if sys.argv[4:] else flip
    )
    print(f"{len(unseen)} of {sys.argv[2]} flips not reported: {unseen[:10]}")
    print(f"{len(wrong)} gave a wrong value: {wrong[:10]}")
