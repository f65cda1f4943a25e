"""The budget suite: planned ranks beside the least rank that certifies."""

from hypothesis import given
from hypothesis import strategies as st

from loramem.suites import budget
from loramem.suites.runner import Request


@given(st.integers(1, 40), st.integers(1, 60))
def test_bisection_finds_the_least_rank_from_either_side(planned: int, least: int) -> None:
    asked: list[int] = []

    def certifies(rank: int) -> bool:
        asked.append(rank)
        return rank >= least

    assert budget.least_rank(planned, certifies) == least
    assert asked[0] == planned
    assert len(asked) == len(set(asked))


def line(rank: int, smallest: int, first_try: bool) -> dict[str, object]:
    result = {
        "length": 300, "records": 30, "cost_bits": 900.0, "calibrated": True, "rank": rank, "parameters": 1000 * rank,
        "expected": 0.9, "first_try": first_try, "training_s": 1.5, "smallest": smallest,
    }  # fmt: skip
    return {"cell": {"kind": "text"}, "result": result}


def test_the_table_counts_first_tries_and_the_worst_ratio() -> None:
    table = budget.table([line(2, 1, True), line(3, 2, True), line(2, 3, False)])
    assert table.rows[2] == ("text", "300", "900", "2", "90%", "no", "3", "0.67", "0.45", "1.5")
    assert table.notes == ("2 of 3 certified at the first try; at most 2.00 times the smallest rank.",)


def test_there_are_twelve_jobs_that_no_calibration_made() -> None:
    cells = list(budget.cells(Request(), lambda cell: {}))
    assert len({cell.title for cell in cells}) == 12
    assert {cell.seed for cell in cells} == {budget.SEED}
