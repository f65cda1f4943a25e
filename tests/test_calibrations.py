"""What is known of a base model is what its runs say, comes back from disk as it was, and is asked where it applies."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from loramem import base_path
from loramem.errors import InputError
from loramem.planning import calibration, success
from loramem.planning.calibration import (
    Calibration,
    KindSamples,
    Sample,
    cached,
    load,
    nearest_kind,
    outcomes_of,
    plan_inputs,
    plan_length,
    summarise,
)
from loramem.planning.limits import GOALS
from loramem.planning.plan import PlanInputs
from loramem.planning.runs import Run
from loramem.records.outcome import Outcome

WEIGHTS, SHIPPED = "0123456789ab", calibration.SHIPPED
PLACE, ELSEWHERE = (("down_proj", "up_proj"), (4, 5)), (("o_proj",), (4,))
BARE = Calibration("tiny", WEIGHTS, 1024, *PLACE, parameters_per_rank=500)
RUN = Run(
    kind="random",
    rank=1,
    length=200,
    seed=0,
    modules=PLACE[0],
    layers=PLACE[1],
    records=10,
    parameters=500,
    bits=2000.0,
    cost_bits=1900.0,
    base_loss=12.0,
    final_loss=5.0,
    ordered=0.0,
    certified=False,
    steps=30,
    visits=300,
    training_s=1.0,
    elapsed_s=1.5,
    conditions={
        "base_model": "tiny",
        "base_weights": WEIGHTS,
        "dtype": "float32",
        "device": "cpu",
        "threads": 2,
        "torch": "2.9.0",
        "objective": "sft",
    },
)


def of_law(kind: str = "random", base_loss: float = 12.0) -> list[Run]:
    """Runs that follow ΔL = 9·r^0.4·ℓ^−0.3 − 0.2 exactly; a token costs as much as its loss says."""
    return [
        replace(
            RUN,
            kind=kind,
            rank=rank,
            length=length,
            parameters=500 * rank,
            base_loss=base_loss,
            final_loss=base_loss - (9 * rank**0.4 * length**-0.3 - 0.2),
            cost_bits=length * (base_loss / math.log(2) - 1),
        )
        for rank in (1, 2, 4, 8)
        for length in (200, 400, 800, 1600)
    ]


def writes() -> list[Run]:
    """Runs as the store writes: certified from two parameters per bit upwards, visited 20 / √density times."""
    return [
        replace(
            RUN,
            kind="phonebook",
            rank=rank,
            parameters=500 * rank,
            cost_bits=1000.0,
            length=400,
            certified=rank >= 4,
            visits=round(20 * math.sqrt(1000 / (500 * rank)) * RUN.records),
            conditions={**RUN.conditions, "objective": "memft-sw"},
        )
        for rank in (1, 2, 3, 4, 6, 8, 12, 16)
    ]


KNOWN = summarise(BARE, [*of_law(), *writes()])


@pytest.fixture(autouse=True)
def nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a cache nor what ships with loramem-tiny."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "SHIPPED", tmp_path / "shipped.json")


# --- runs to knowledge


def test_runs_of_a_law_give_that_law() -> None:
    law = summarise(BARE, of_law()).law("random", PLACE)
    assert law is not None
    assert law.constants == pytest.approx((9, 0.4, 0.3, -0.2), rel=1e-3)
    assert (law.points, law.dropped) == (16, 0)


def test_writes_give_the_boundary_and_the_pace_of_their_placement() -> None:
    placed = KNOWN.placed(PLACE)
    assert placed is not None and placed.boundary is not None and placed.pace is not None
    assert placed.parameters_per_rank == 500
    assert placed.boundary == success.fit(placed.outcomes)
    assert len(placed.outcomes) == 8  # the law's runs were not certified
    assert placed.boundary.certified == placed.pace.outcomes == 5
    assert placed.pace.exponent == pytest.approx(0.5, abs=0.02)
    assert placed.pace.at_one_bit == pytest.approx(20, rel=0.02)


def test_a_kind_is_known_at_every_length_once() -> None:
    assert [entry.kind for entry in KNOWN.kinds] == ["phonebook", "random"]
    random = KNOWN.samples("random")
    assert random is not None
    assert [sample.length for sample in random.samples] == [200, 400, 800, 1600]
    assert random.samples[1] == Sample(400, 12.0, 400 * (12 / math.log(2) - 1))
    assert KNOWN.samples("text") is None


def test_the_conditions_say_where_the_runs_were_made_and_how_many() -> None:
    assert KNOWN.conditions == {"dtype": "float32", "device": "cpu", "threads": 2, "torch": "2.9.0", "runs": 24}


def test_what_the_runs_do_not_determine_is_left_out() -> None:
    few = summarise(BARE, [*of_law()[:3], *writes()[:3]])
    assert few.laws == ()
    placed = few.placed(PLACE)
    assert placed is not None
    assert (len(placed.outcomes), placed.boundary, placed.pace) == (3, None, None)


def test_without_runs_nothing_is_known() -> None:
    assert summarise(BARE, []) == replace(BARE, conditions={"runs": 0})


def test_runs_of_another_base_model_say_nothing() -> None:
    foreign = [replace(run, conditions={**run.conditions, "base_weights": "ba9876543210"}) for run in of_law()]
    assert summarise(BARE, foreign).conditions == {"runs": 0}
    assert summarise(BARE, [*foreign, *of_law()]) == summarise(BARE, of_law())


def test_placements_and_kinds_are_kept_apart() -> None:
    elsewhere = [replace(run, modules=ELSEWHERE[0], layers=ELSEWHERE[1]) for run in of_law("text", 9.0)]
    both = summarise(BARE, [*of_law(), *elsewhere])
    assert [(entry.kind, entry.place) for entry in both.laws] == [("random", PLACE), ("text", ELSEWHERE)]
    both = summarise(BARE, [*elsewhere, *writes()])
    assert {entry.place: len(entry.outcomes) for entry in both.boundaries} == {PLACE: 8, ELSEWHERE: 0}
    assert both.law("text", PLACE) is None
    assert both.law("text", ELSEWHERE) is not None
    assert both.placed((("o_proj",), (3,))) is None


# --- outcomes


@pytest.mark.parametrize(
    ("objective", "final_loss", "certified", "counts"),
    [
        ("sft", 5.0, False, False),  # plain cross-entropy may stay on a plateau that a write leaves
        ("sft", 0.5, False, False),  # a write goes on until it is certified, and might have been
        ("sft", 0.01, True, True),
        ("memft-sw", 5.0, False, True),
        ("memft-sw", 0.5, False, True),  # this was a write
        ("memft-sw", 0.3, True, True),
    ],
)
def test_which_runs_say_what_a_write_would_have_come_to(
    objective: str, final_loss: float, certified: bool, counts: bool
) -> None:
    run = replace(
        RUN, final_loss=final_loss, certified=certified, conditions={**RUN.conditions, "objective": objective}
    )
    visits = None if objective == "sft" else 30.0  # 300 of 10 records; the law's training visits all in every pass
    assert outcomes_of(run) == [Outcome("random", 1, 200, 500, 1900.0, certified, visits)] * counts


# --- what a kind costs


SAMPLES = KindSamples("text", (Sample(100, 4.0, 500.0), Sample(400, 3.0, 1400.0), Sample(1600, 2.8, 5000.0)))


def test_what_was_measured_is_said_as_it_was() -> None:
    assert [SAMPLES.at(length) for length in (100, 400, 1600)] == [(4.0, 500.0), (3.0, 1400.0), (2.8, 5000.0)]


def test_between_the_samples_by_hand() -> None:
    # 200 is half of the way from 100 to 400 in ln ℓ and a third in ℓ; 800 the same from 400 to 1600.
    assert SAMPLES.at(200) == (pytest.approx(3.5), pytest.approx(800.0))
    assert SAMPLES.at(800) == (pytest.approx(2.9), pytest.approx(2600.0))


def test_beyond_the_samples_loss_and_cost_per_token_are_those_of_the_nearest() -> None:
    assert SAMPLES.at(20) == (4.0, 100.0)
    assert SAMPLES.at(3200) == (2.8, 10_000.0)


def test_one_sample_is_enough() -> None:
    (sample,) = SAMPLES.samples[:1]
    assert [KindSamples("text", (sample,)).at(length)[1] for length in (10, 100, 1000)] == [50.0, 500.0, 5000.0]


def test_the_nearest_kind_costs_most_nearly_as_much() -> None:
    known = summarise(BARE, [*of_law("random", 12.0), *of_law("text", 4.0)])
    # At 400 tokens they cost 400 · (12 / ln 2 − 1) = 6525 and 400 · (4 / ln 2 − 1) = 1908 bits; half way in ln is 3529.
    assert nearest_kind(known, 3400.0, 400) == "text"
    assert nearest_kind(known, 3700.0, 400) == "random"
    assert nearest_kind(known, 0.0, 400) == "text"
    assert nearest_kind(BARE, 3400.0, 400) is None


def test_the_pace_is_that_of_the_kind() -> None:
    slow = [replace(run, kind="text", visits=10 * run.visits) for run in writes()]
    known = summarise(BARE, [*writes(), *slow])
    paces = {kind: plan_inputs(known, PLACE, 500, kind).pace for kind in ("phonebook", "text", "songs", None)}
    assert all(paces.values())
    visits = {kind: found.visits(8000, 1000.0) for kind, found in paces.items() if found}
    assert visits["text"] == pytest.approx(10 * visits["phonebook"], rel=0.01)
    assert visits["phonebook"] < visits["songs"] == visits[None] < visits["text"]  # of unknown kinds all are believed
    own = plan_inputs(known, PLACE, 500, "songs", [Outcome("songs", 16, 400, 8000, 1000.0, True, 3.0)] * 5).pace
    assert own is not None and own.visits(8000, 1000.0) == pytest.approx(3.0)


# --- what a plan rests on


def test_a_basis_holds_what_is_known_of_the_placement() -> None:
    placed = KNOWN.placed(PLACE)
    assert placed is not None
    found = plan_inputs(KNOWN, PLACE, 500, "random", seconds_per_visit=0.01)
    # A and B of two modules in two layers.
    assert found == PlanInputs(500, 8, placed.boundary, KNOWN.law("random", PLACE), "random", placed.pace, 0.01)
    assert plan_inputs(KNOWN, PLACE, 500).law is None
    assert plan_inputs(KNOWN, ELSEWHERE, 90) == PlanInputs(90, 2)
    assert plan_inputs(None, ELSEWHERE, 90) == PlanInputs(90, 2)


def test_the_outcomes_of_a_store_move_its_boundary() -> None:
    failed = [Outcome("unknown", 16, 400, 8000, 1000.0, False)] * 10
    before, after = plan_inputs(KNOWN, PLACE, 500).boundary, plan_inputs(KNOWN, PLACE, 500, outcomes=failed).boundary
    assert before is not None and after is not None
    assert (after.outcomes, after.certified) == (before.outcomes + 10, before.certified)
    assert after.probability(8000, 1000.0, 400) < before.probability(8000, 1000.0, 400)


def test_the_outcomes_of_a_store_alone_make_a_boundary_once_there_are_five() -> None:
    outcomes = [Outcome("unknown", 4, 400, 2000, 1000.0, True, 20.0)] * 5
    four, five = plan_inputs(None, PLACE, 500, outcomes=outcomes[:4]), plan_inputs(None, PLACE, 500, outcomes=outcomes)
    assert four.boundary is None and five.boundary is not None
    assert five.boundary.kind_needs.keys() == {"unknown"}
    assert four.pace is not None and four.pace.visits(2000, 1000.0) == pytest.approx(20)


@pytest.mark.parametrize(("length", "records"), [(10, 3), (3, 3), (1000, 1), (4001, 400), (7, 2)])
def test_a_length_is_shared_evenly(length: int, records: int) -> None:
    plan = plan_length(SAMPLES, PlanInputs(500, 8), length, records)
    assert plan.length == length
    assert sum(shard.records for shard in plan.shards) == records
    each = length / records
    for shard in plan.shards:
        assert math.floor(each) * shard.records <= shard.length <= math.ceil(each) * shard.records


def test_a_planned_length_costs_what_its_kind_does() -> None:
    [shard] = plan_length(SAMPLES, PlanInputs(500, 2), 200, 20, goal="small").shards
    assert (shard.base_loss, shard.cost_bits) == SAMPLES.at(200)
    assert shard.rank == math.ceil(SAMPLES.at(200)[1] / (GOALS["small"].density * 500))


def test_asking_what_is_known_needs_neither_torch_nor_scipy() -> None:
    KNOWN.save(cached(WEIGHTS))
    code = (
        "import sys\nfrom loramem.planning.calibration import plan_inputs, load, plan_length\n"
        f"known = load({WEIGHTS!r})\n"
        "plan_length(known.samples('random'), plan_inputs(known, known.place, 500, 'random'), 5000, 20)\n"
        "assert not {'numpy', 'scipy', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- on disk


def test_what_ships_is_of_the_base_model_that_ships() -> None:
    from loramem.models.fingerprint import fingerprint

    assert json.loads(SHIPPED.read_text())["base_weights"] == fingerprint(base_path()).weights[:12]


def test_what_was_saved_comes_back_exactly(tmp_path: Path) -> None:
    KNOWN.save(cached(WEIGHTS))
    copy = load(WEIGHTS)
    assert copy == KNOWN
    copy.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == cached(WEIGHTS).read_bytes()
    assert list(cached(WEIGHTS).parent.iterdir()) == [cached(WEIGHTS)]  # nothing is left beside


def test_a_bare_calibration_comes_back_too() -> None:
    BARE.save(cached(WEIGHTS))
    assert load(WEIGHTS) == BARE


def test_nothing_is_known_of_a_base_model_that_was_never_calibrated() -> None:
    assert load(WEIGHTS) is None
    assert load() is None


def test_the_users_own_calibration_is_preferred_to_the_shipped_one() -> None:
    shipped = replace(KNOWN, conditions={"runs": 1})
    shipped.save(calibration.SHIPPED)
    assert load(WEIGHTS) == load() == shipped
    KNOWN.save(cached(WEIGHTS))
    assert load(WEIGHTS) == load() == KNOWN


def test_the_shipped_calibration_is_of_one_base_model_alone() -> None:
    KNOWN.save(calibration.SHIPPED)
    assert load("ba9876543210") is None
    replace(KNOWN, base_weights="ba9876543210").save(cached("ba9876543210"))
    found = load("ba9876543210")
    assert found is not None
    assert found.base_weights == "ba9876543210"


def saved(**changed: object) -> str:
    return json.dumps({"format": 1, **asdict(KNOWN), **changed})


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "7",
        "null",
        "{}",
        saved(kinds=None),
        saved(kinds=[{"kind": "text"}]),
        saved(laws=[{"kind": "text", "modules": [], "layers": [], "law": {}}]),
        saved(boundaries=[7]),
        saved(extra=1),
        saved(modules=None),
        json.dumps(asdict(KNOWN)),
    ],
    ids=lambda content: content[:20],
)
def test_a_damaged_calibration_is_refused_in_one_line_that_names_it(content: str) -> None:
    cached(WEIGHTS).parent.mkdir(parents=True)
    cached(WEIGHTS).write_text(content)
    with pytest.raises(InputError, match="is not a calibration") as caught:
        load(WEIGHTS)
    message = str(caught.value)
    assert str(cached(WEIGHTS)) in message and "loramem calibrate" in message
    assert len(message.splitlines()) == 1


def test_another_format_is_refused_with_both_numbers() -> None:
    cached(WEIGHTS).parent.mkdir(parents=True)
    cached(WEIGHTS).write_text(saved(format=2))
    with pytest.raises(InputError) as caught:
        load(WEIGHTS)
    assert str(caught.value) == (f"{cached(WEIGHTS)} has format 2, this version of loramem reads 1. Calibrate again.")
