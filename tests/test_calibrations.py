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
    cached,
    load,
    nearest_kind,
    outcomes_of,
    plan_inputs,
    plan_length,
    rank_law_of,
    summarise,
    trials_of,
)
from loramem.planning.limits import GOALS
from loramem.planning.plan import PlanInputs
from loramem.planning.rank_law import KindSamples, Sample
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
    vocabulary=190.0,
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
    """Runs as the store writes, of numbers: certified from rank 4 upwards, visited 20 / √density times."""
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
            vocabulary=11.0,
            conditions={**RUN.conditions, "objective": "memft-sw"},
        )
        for rank in (1, 2, 3, 4, 6, 8, 12, 16)
    ]


KNOWN = summarise(BARE, [*of_law(), *writes()])


@pytest.fixture(autouse=True)
def nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a cache nor what ships with loramem-tiny."""
    calibration.guess.cache_clear()
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
    assert placed.law is not None
    assert placed.boundary == success.fit(trials_of(placed.outcomes, placed.law))
    assert len(placed.outcomes) == 8  # the law's runs were not certified
    assert placed.boundary.certified == placed.pace.outcomes == 5
    assert placed.pace.exponent == pytest.approx(0.5, abs=0.02)
    assert placed.pace.at_one_bit == pytest.approx(20, rel=0.02)


def test_a_kind_is_known_at_every_length_once() -> None:
    assert [entry.kind for entry in KNOWN.kinds] == ["phonebook", "random"]
    random = KNOWN.samples("random")
    assert random is not None
    assert [sample.length for sample in random.samples] == [200, 400, 800, 1600]
    assert random.samples[1] == Sample(400, 12.0, 400 * (12 / math.log(2) - 1), 190.0)
    assert KNOWN.samples("text") is None


def test_the_conditions_say_where_the_runs_were_made_and_how_many() -> None:
    assert KNOWN.conditions == {"dtype": "float32", "device": "cpu", "threads": 2, "torch": "2.9.0", "runs": 24}


def test_what_the_runs_do_not_determine_is_left_out() -> None:
    few = summarise(BARE, [*of_law()[:3], *writes()[:3]])
    assert few.laws == ()
    placed = few.placed(PLACE)
    assert placed is not None
    assert (len(placed.outcomes), placed.law, placed.boundary, placed.pace) == (3, None, None, None)


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


def test_the_rank_law_is_fitted_beside_one_base_loss_and_inverts_the_law() -> None:
    lucky = [replace(run, base_loss=run.base_loss + (2.0 if run.length < 1000 else 0.0)) for run in of_law()]
    law = rank_law_of(lucky)
    assert law == rank_law_of([*of_law(), *writes()])
    assert law is not None and law.base_loss == 12.0
    # 9·r^0.4·ℓ^−0.3 − 0.2 = 12 − 0.69
    assert law.rank(400.0).rank == pytest.approx((11.51 / 9 * 400**0.3) ** 2.5, rel=1e-2)
    assert rank_law_of(of_law("text")) is None


def test_of_runs_of_older_versions_no_vocabulary_is_known() -> None:
    old = [replace(run, vocabulary=None) for run in (*of_law(), *writes())]
    known = summarise(BARE, old)
    placed = known.placed(PLACE)
    assert known.kinds == () and len(known.laws) == 1
    assert placed is not None and placed.law is not None and placed.boundary is None
    assert plan_inputs(known, PLACE, 500).calibrated


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
    assert outcomes_of(run) == [Outcome("random", 1, 200, 500, 1900.0, certified, visits, 190.0)] * counts


# --- kinds


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
    assert placed is not None and placed.law is not None
    found = plan_inputs(KNOWN, PLACE, 500, "random", seconds_per_visit=0.01)
    # A and B of two modules in two layers.
    assert found == PlanInputs(500, 8, placed.law, placed.boundary, True, "random", placed.pace, 0.01)
    assert plan_inputs(KNOWN, ELSEWHERE, 90) == PlanInputs(90, 2)
    assert plan_inputs(None, ELSEWHERE, 90) == PlanInputs(90, 2)


def test_without_a_law_of_its_own_a_single_module_is_planned_as_that_of_the_base_model_that_ships() -> None:
    shipped = replace(KNOWN, modules=ELSEWHERE[0], layers=ELSEWHERE[1])
    here = replace(shipped.boundaries[0], modules=ELSEWHERE[0], layers=ELSEWHERE[1])
    replace(shipped, boundaries=(here,)).save(calibration.SHIPPED)
    found = plan_inputs(None, ELSEWHERE, 90)
    assert (found.law, found.boundary, found.calibrated) == (here.law, here.boundary, False)
    assert found.pace is None  # of writes on another base model
    assert plan_inputs(None, PLACE, 500).law is None  # several modules take other ranks


def test_the_outcomes_of_a_store_move_its_boundary() -> None:
    failed = [Outcome("unknown", 16, 400, 8000, 1000.0, False, vocabulary=11.0)] * 10
    before, after = plan_inputs(KNOWN, PLACE, 500).boundary, plan_inputs(KNOWN, PLACE, 500, outcomes=failed).boundary
    assert before is not None and after is not None
    assert (after.trials, after.certified) == (before.trials + 10, before.certified)
    assert after.probability(16, 4.0) < before.probability(16, 4.0)
    unknown = [replace(one, vocabulary=None) for one in failed]  # of writes before vocabularies were noted
    assert plan_inputs(KNOWN, PLACE, 500, outcomes=unknown).boundary == before


def test_the_outcomes_of_a_store_tell_its_pace() -> None:
    outcomes = [Outcome("unknown", 4, 400, 2000, 1000.0, True, 20.0, 11.0)] * 4
    found = plan_inputs(None, PLACE, 500, outcomes=outcomes)
    assert found.law is None and found.boundary is None
    assert found.pace is not None and found.pace.visits(2000, 1000.0) == pytest.approx(20)


SAMPLES = KindSamples("text", (Sample(100, 4.0, 500.0, 60.0), Sample(1600, 2.8, 5000.0, 300.0)))


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
    expected = SAMPLES.at(200)
    assert (shard.base_loss, shard.cost_bits, shard.vocabulary) == (
        *(expected.base_loss, expected.cost_bits),
        expected.vocabulary,
    )
    assert shard.rank == math.ceil(expected.cost_bits / (GOALS["small"].density * 500))


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
    return json.dumps({"format": 3, **asdict(KNOWN), **changed})


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
    cached(WEIGHTS).write_text(saved(format=4))
    with pytest.raises(InputError) as caught:
        load(WEIGHTS)
    assert str(caught.value) == (f"{cached(WEIGHTS)} has format 4, this version of loramem reads 3. Calibrate again.")


def test_what_an_older_version_left_in_the_cache_is_as_if_it_were_not_there() -> None:
    cached(WEIGHTS).parent.mkdir(parents=True)
    cached(WEIGHTS).write_text(json.dumps({"format": 1, "kinds": []}))
    assert load(WEIGHTS) is None
    KNOWN.save(calibration.SHIPPED)
    assert load(WEIGHTS) == KNOWN
