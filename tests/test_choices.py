"""An argument that takes one of a few strings refuses any other where it comes in, and says which there are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loramem import MemoryStore, WriterSettings
from loramem.errors import UnknownChoice, UnsupportedBaseModel


@pytest.fixture(scope="module")
def store(base: Path, tmp_path_factory: pytest.TempPathFactory) -> MemoryStore:
    return MemoryStore(tmp_path_factory.mktemp("store") / "memory", str(base))


ONE: dict[str, str] = {"key": "1"}


@pytest.mark.parametrize(
    ("argument", "choices", "call"),
    [
        ("goal", ("fast", "small"), lambda store, it: store.write(ONE, goal=it)),
        ("goal", ("fast", "small"), lambda store, it: store.plan(ONE, goal=it)),
        ("goal", ("fast", "small"), lambda store, it: store.update("key", "2", goal=it)),
        ("goal", ("fast", "small"), lambda store, it: store.rename("key", "other", goal=it)),
        ("on_conflict", ("error", "skip", "replace"), lambda store, it: store.write(ONE, on_conflict=it)),
        ("on_conflict", ("error", "skip", "replace"), lambda store, it: store.plan(ONE, on_conflict=it)),
        ("objective", ("sft", "memft-ot", "memft-sw"), lambda _, it: WriterSettings(objective=it)),
        ("which", ("advised", "dead", "all"), lambda store, it: store.compact(which=it)),
        ("target", ("peft", "vllm", "sglang", "llama.cpp"), lambda store, it: store.check([it])),
        ("dtype", ("float32", "bfloat16", "float16"), lambda store, it: store.deploy("peft", "/nowhere", dtype=it)),
    ],
)
@pytest.mark.parametrize("value", ["nonsense", "FAST", ""])
def test_any_other_string_is_refused_and_nothing_is_written(
    store: MemoryStore, argument: str, choices: tuple[str, ...], call: Callable[[MemoryStore, Any], object], value: str
) -> None:
    with pytest.raises(UnknownChoice) as caught:
        call(store, value)
    error = caught.value
    assert (error.argument, error.value, error.choices) == (argument, value, choices)
    assert str(error) == f"{argument} must be one of {', '.join(choices)}, not {value!r}"
    assert isinstance(error, ValueError)
    assert len(store) == 0


def test_a_dtype_that_nothing_is_computed_in_is_refused_with_the_base_model(base: Path, tmp_path: Path) -> None:
    for how in ({"dtype": "int4"}, {"serve": ["bfloat16", "int4"]}):
        with pytest.raises(UnsupportedBaseModel, match="int4"):
            MemoryStore(tmp_path / "memory", str(base), **how)  # type: ignore[arg-type]
