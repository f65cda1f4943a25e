"""The locality suite: divergence on neutral text, none where a store routes."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loramem import MemoryStore, Record
from loramem.errors import InputError
from loramem.models.adapters import AdaptedModel
from loramem.suites import abilities, figures, locality, passages
from loramem.suites.divergence import Passage, effect, identical, predictions, windows
from loramem.suites.runner import SuiteOptions


def cell(base: Path, **fields: object) -> locality.Cell:
    known = {"kind": "phonebook", "records": 2, "rank": 4, "tokens": 300, "data": None, "digest": "", "seed": 0}
    return locality.Cell(**{**known, **fields}, model=str(base), device="cpu")


SETTING = {"tokens": 8192, "data": None, "digest": ""}

# Numbers


def test_divergence_losses_and_argmax_are_those_worked_out_by_hand() -> None:
    passage = Passage((5, 1, 0), 1)
    first = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.4, 0.4]]).log()
    second = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.4, 0.4]]).log() + 3.0  # a constant changes no prediction
    found = effect([passage], [first], [second])
    # 0.5 ln(0.5 / 0.25) + 0.25 ln(0.25 / 0.5) = 0.25 ln 2
    assert found.divergence.tolist() == pytest.approx([0.25 * math.log(2), 0], abs=1e-6)
    assert found.before.tolist() == pytest.approx([-math.log(0.25), -math.log(0.2)], rel=1e-6)
    assert found.after.tolist() == pytest.approx([-math.log(0.5), -math.log(0.2)], rel=1e-6)
    assert found.changed.tolist() == [True, False]
    assert (found.hit_before.tolist(), found.hit_after.tolist()) == ([False, False], [True, False])
    assert locality.summary([found])["changed"] == 0.5
    assert locality.summary([found, found])["kl_mean"] == pytest.approx(0.125 * math.log(2), rel=1e-5)


def test_equal_predictions_diverge_by_exactly_nothing() -> None:
    logits = [torch.randn(7, 50, generator=torch.Generator().manual_seed(0))]
    assert effect([Passage(tuple(range(8)), 1)], logits, logits).divergence.tolist() == [0.0] * 7
    assert identical(logits, [logits[0].clone()])
    assert not identical(logits, [logits[0].nextafter(torch.tensor(9.0))])
    assert not identical(logits, [])


def test_windows_cut_a_text_and_begin_as_the_tokenizer_would() -> None:
    assert windows(range(10, 17), 3, None) == [Passage((10, 11, 12), 1), Passage((13, 14, 15), 1)]
    assert windows(range(10, 15), 3, 1) == [Passage((1, 10, 11), 1), Passage((1, 12, 13), 1)]
    assert windows([1, 2], 3, None) == []


def test_what_is_predicted_is_each_scored_token_from_those_before_it(base: Path) -> None:
    from loramem.models.base_model import load_base_model

    model = load_base_model(str(base), device="cpu").model
    ids = tuple(range(4, 14))
    (whole,), (last,) = predictions(model, [Passage(ids, 1)]), predictions(model, [Passage(ids, 9)])
    assert whole.shape == (9, model.config.vocab_size)
    assert torch.equal(whole[-1:], last)
    with torch.no_grad():
        assert torch.allclose(whole, model(input_ids=torch.tensor([ids])).logits[0, :-1], atol=1e-5)


# Text


def test_neutral_text_differs_by_seed_and_source_code_is_held_out() -> None:
    from loramem.embedded.corpus import is_held_out, standard_library

    first, again, other = (passages.neutral_documents(None, seed) for seed in (0, 0, 1))
    assert first == again != other
    held_out = {text for name, text in standard_library().documents.items() if is_held_out(name)}
    assert set(first[passages.SOURCE]) <= held_out
    assert {name: sorted(texts) for name, texts in first.items()} == {n: sorted(t) for n, t in other.items()}


def test_a_file_takes_the_place_of_both_texts(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("the lazy dog " * 300)
    (made,) = locality.cells(SuiteOptions(data=path, quick=True, ranks=(4,)), lambda _: {})
    path.write_text("the quick fox " * 300)
    (edited,) = locality.cells(SuiteOptions(data=path, quick=True, ranks=(4,)), lambda _: {})
    assert made.identity != edited.identity
    assert made.identity["data"] == "own.txt"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        passages.neutral_documents(path, 0)


def test_a_text_shorter_than_a_window_is_refused(base: Path, tmp_path: Path) -> None:
    from loramem.models.base_model import load_base_model

    path = tmp_path / "short.txt"
    path.write_text("a few words")
    with pytest.raises(InputError, match=r"short\.txt has \d+ tokens; neutral text needs at least 256"):
        passages.neutral_passages(load_base_model(str(base), device="cpu"), path, 300, 0)


# A cell


@pytest.fixture(scope="module")
def result(base_of: Callable[..., Path]) -> dict:
    return locality.run(cell(base_of("qwen3")))


def test_a_tiny_cell_changes_nothing_routed_and_something_unrouted(result: dict) -> None:
    assert (result["exact"], result["failed"], result["adapters"]) == (2, [], 1)
    assert result["refused"] == result["strangers"] == locality.STRANGERS
    assert set(result["texts"]) == {passages.DOCUMENTATION, passages.SOURCE, passages.HELD_OUT, passages.UNKNOWN}
    assert result["texts"][passages.UNKNOWN]["tokens"] == locality.STRANGERS
    for text in result["texts"].values():
        routed, unrouted = text["routed"], text["unrouted"]
        assert routed["identical"]
        assert (routed["kl_mean"], routed["kl_max"], routed["changed"]) == (0, 0, 0)
        assert routed["loss_on"] == routed["loss_off"] == unrouted["loss_off"]
        assert unrouted["kl_max"] >= unrouted["kl_mean"] > 0
        assert unrouted["loss_on"] != unrouted["loss_off"]
    assert json.loads(json.dumps(result)) == result


def test_an_adapter_that_stayed_active_would_show(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdaptedModel, "deactivate", lambda _: None)
    routed = [text["routed"] for text in locality.run(cell(base))["texts"].values()]
    assert not any(one["identical"] for one in routed)
    assert min(one["kl_max"] for one in routed) > 0


def test_where_nothing_is_certified_only_the_routed_base_is_left(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loramem.errors import StubbornRecords

    def stubborn(self: MemoryStore, records: list, **_: object) -> None:
        raise StubbornRecords("none", keys=[record.key for record in records], rank=1)

    monkeypatch.setattr(MemoryStore, "write", stubborn)
    found = locality.run(cell(base, rank=1))
    assert (found["exact"], len(found["failed"]), found["parameters"]) == (0, 2, 0)
    line = {"cell": {"records": 2, "rank": 1, "seed": 0, **SETTING}, "result": found}
    table = locality.table([line])
    assert [row[6] for row in table.rows] == ["-"] * 4
    assert "2 records could not be certified" in table.notes[-1]
    assert locality.plots([line]) == ()


# Tables and plots


def line(rank: int, seed: int, kl: float, change: float) -> dict:
    text = {
        "tokens": 100,
        "routed": {"identical": True, "loss_off": 2.0, "loss_on": 2.0, "kl_mean": 0.0, "kl_max": 0.0, "changed": 0.0},
        "unrouted": {
            "loss_off": 2.0, "loss_on": 2.0 + change, "kl_mean": kl, "kl_max": 9 * kl, "changed": 0.125,
        },
    }  # fmt: skip
    result = {
        "records": 10, "failed": [], "exact": 10, "adapters": 1, "parameters": 100 * rank, "seconds": 1.0,
        "strangers": 5, "refused": 5, "texts": {"documentation": text},
    }  # fmt: skip
    return {"cell": {"records": 10, "rank": rank, "seed": seed, **SETTING}, "result": result}


def test_seeds_of_a_rank_share_a_row() -> None:
    table = locality.table([line(4, 0, 0.1, 0.5), line(4, 1, 0.3, -0.1), line(1, 0, 0.2, 0.25)])
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [row["rank"] for row in rows] == ["1", "4"]
    assert rows[0] == {
        "records": "10", "rank": "1", "parameters": "100", "exact": "10/10", "neutral text": "documentation",
        "tokens": "100", "KL mean": "0.2", "KL max": "1.8", "loss off": "2.000", "loss on": "2.250",
        "change": "+0.250", "other argmax": "12.5%", "next token right: off": "-", "on": "-", "KL max, routed": "0",
    }  # fmt: skip
    assert (rows[1]["exact"], rows[1]["tokens"]) == ("20/20", "200")
    assert rows[1]["KL mean"] == "0.2 (0.1 to 0.3)"
    assert rows[1]["change"] == "+0.200 (-0.100 to +0.500)"
    assert "3 of 3 texts have logits that are bit for bit" in table.notes[0]
    assert "15 of 15 unknown keys are refused" in table.notes[0]


def test_other_neutral_text_is_no_other_seed_and_another_device_no_second_one() -> None:
    less, file, device = (line(4, 0, kl, 0.0) for kl in (0.5, 0.7, 0.1))
    less["cell"] |= {"tokens": 512}
    file["cell"] |= {"data": "own.txt", "digest": "0a1b"}
    device["cell"] |= {"device": "cpu"}
    lines = [line(4, 0, 0.1, 0.0), device, line(4, 1, 0.3, 0.0), less, file]
    rows = locality.table(lines).rows
    assert [(row[3], row[4], row[6]) for row in rows] == [
        ("20/20", "documentation (8,192 tokens)", "0.2 (0.1 to 0.3)"),
        ("10/10", "documentation (512 tokens)", "0.5"),
        ("10/10", "documentation (8,192 tokens of file 0a1b)", "0.7"),
    ]
    assert [series.name for series in locality.plots(lines)[0].series] == [row[4] for row in rows]


def test_the_plots_go_over_the_rank_and_show_losses_that_fall() -> None:
    lines = [line(1, 0, 0.2, 0.25), line(4, 0, 0.1, -0.5)]
    divergence, loss = locality.plots(lines)
    assert [(one.x, one.y) for one in divergence.series[0].points] == [(1, 0.2), (4, 0.1)]
    assert [one.y for one in loss.series[0].points] == [0.25, -0.5]
    pytest.importorskip("matplotlib")
    (axes, *_) = figures.figure(loss).axes
    low, high = axes.get_ylim()
    assert low < -0.5 < 0.25 < high


# Loops, and what an adapter leaves of abilities


def test_a_loop_is_measured_with_its_adapter_attached(base: Path) -> None:
    loop = "peft-kl"
    asked = locality.run(cell(base, rank=16, loop=loop))  # stopped after a step
    assert asked["capped"] and asked["exact"] < 2
    for text in asked["texts"].values():
        assert text["routed"] is None and text["unrouted"]["kl_mean"] > 0
    assert asked["questions"]["asked"] == 50
    line = {"cell": {"records": 2, "rank": 16, "seed": 0, "loop": loop, **SETTING}, "result": asked}
    table = locality.table([json.loads(json.dumps(line))])
    assert {row[4].split(", ")[1] for row in table.rows} == {locality.LOOPS[loop]}
    assert "50 questions with known answers" in " ".join(table.notes) and "1 loops were stopped" in table.notes[-1]


def test_the_term_of_a_loop_is_the_divergence_from_the_base(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import TrainingArguments

    from loramem.models.base_model import load_base_model
    from loramem.suites import baselines
    from loramem.training.neutral import sequences
    from loramem.training.settings import KeepBase

    loaded = load_base_model(str(base), device="cpu")
    neutral = sequences(loaded, [Record("key 0", "1"), Record("key 1", "2")], KeepBase(questions=4, text_tokens=300), 0)
    text = [Passage((*one.prompt_ids, *one.answer_ids), len(one.prompt_ids)) for one in neutral]
    bare = list(predictions(loaded.model, text))
    model = get_peft_model(loaded.model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    expected = float(effect(text, bare, list(predictions(loaded.model, text))).divergence.mean())
    batch = next(baselines._batches(loaded, neutral[:2], 2))
    losses = []
    for material in (None, baselines._batches(loaded, neutral, len(neutral))):
        arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
        loop = baselines._Loop(neutral=material, model=model, args=arguments)
        losses.append(float(loop.compute_loss(model, dict(batch)).detach()))
    assert expected > 0.01
    assert losses[1] - losses[0] == pytest.approx(baselines.KL_WEIGHT * expected, rel=1e-3)


def test_answers_are_right_where_they_have_the_word() -> None:
    wrong = ["no"] * len(abilities.QUESTIONS)
    assert (len(abilities.QUESTIONS), abilities.right(wrong)) == (50, 0)
    assert abilities.right(["The capital is PARIS.", *wrong[1:]]) == 1
    assert abilities.right(["Parisian", *wrong[1:]]) == 0
    assert abilities.right([words.split("|")[-1] for _, words in abilities.QUESTIONS]) == 50


def test_there_are_two_seeds_of_every_rank_of_the_write_that_keeps_the_base_and_of_loops() -> None:
    cells = list(locality.cells(SuiteOptions(), lambda _: {}))
    ranks = [(r, s) for r in locality.RANKS for s in range(2)]
    assert [(one.rank, one.seed) for one in cells[:8]] == ranks
    assert [(one.keep, one.loop, one.seed) for one in cells[8:]] == [
        (keep, loop, seed) for seed in range(2) for keep, loop in ((True, ""), (False, "peft"), (False, "peft-kl"))
    ]
    assert not {"keep", "loop", "cap_s"} & cells[0].identity.keys()
    assert cells[8].identity["keep"] and cells[9].identity["loop"] == "peft"
    assert {one.rank for one in locality.cells(SuiteOptions(ranks=(3, 9)), lambda _: {})} == {3, 9}
