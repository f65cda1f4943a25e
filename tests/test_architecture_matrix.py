"""Every causal language model of transformers writes and recalls, or is refused when it is loaded."""

from pathlib import Path

import pytest
import transformers

from .architectures import HEAD, NOT_BUILT, OVERRIDES, REFUSED, TABLE, WRITES, build_tiny, families, outcome, row, table

MIXTURES = ("qwen3_moe", "mixtral", "deepseek_v3", "qwen3_next", "llama4", "gpt_oss", "qwen2_moe", "laguna")
OTHERS = ("jamba", "mamba", "rwkv", "recurrent_gemma", "bart", "longcat_flash", "opt", "qwen4_exp")
TRIED = [family for family in families() if family not in NOT_BUILT]


@pytest.mark.parametrize("family", [*MIXTURES, *OTHERS])
def test_a_family_writes_and_recalls_or_is_refused_at_load(family: str, tmp_path: Path) -> None:
    check(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in TRIED if family not in {*MIXTURES, *OTHERS}])
def test_every_other_family_too(family: str, tmp_path: Path) -> None:
    check(family, tmp_path)


def check(family: str, folder: Path) -> None:
    found = outcome(build_tiny(family, folder / f"tiny-{family}"), folder / "memory")
    expected = table()[family].split("|")[2].strip()
    assert (WRITES if found.writes else REFUSED) == expected, found.reason
    if found.writes:  # reasons hold numbers, and words of other libraries
        assert row(family, found) == table()[family]


@pytest.mark.skipif(
    f"transformers {transformers.__version__.rpartition('.')[0]} " not in TABLE.read_text(),
    reason="the table is of another version, which has other families",
)
def test_the_table_holds_every_family() -> None:
    assert set(table()) == set(families())
    assert len(TRIED) >= 40
    tried = [line for family, line in table().items() if family not in NOT_BUILT]
    assert all(line.split("|")[2].strip() in (WRITES, REFUSED) for line in tried)
    assert all(line.count("|") == HEAD[0].count("|") for line in table().values())
    assert not set(OVERRIDES) - set(families())
