"""A law, a boundary and a run that tests of planning work out by hand."""

from loramem.planning.law import MemoryLaw
from loramem.planning.rank_law import RankLaw
from loramem.planning.runs import Run
from loramem.planning.success import SuccessBoundary

# ΔL = 30 · √r / √ℓ + 1. With no covariance an interval is ± t · σ; t is 2.0150 for 90 % at 9 − 4 degrees of freedom.
LAW = MemoryLaw(
    C=30.0,
    alpha=0.5,
    beta=0.5,
    b=1.0,
    r_squared=0.99,
    mape=3.0,
    covariance=((0.0,) * 4,) * 4,
    sigma=0.1,
    points=9,
    dropped=0,
    rank_range=(1.0, 16.0),
    length_range=(100.0, 900.0),
    reduction_range=(1.0, 20.0),
)
STUDENT_T = 2.0150
# Random tokens cost 6 nats each: the law's rank is where √r = (6 − 0.69 − 1) / 30 · √V, 8.26 at V = 400.
RANK_LAW = RankLaw(LAW, base_loss=6.0)


def vocabulary_for(law_rank: float) -> float:
    """Of answers whose rank by this law it is."""
    return float((30 / 4.31) ** 2 * law_rank)


# Even odds at twice the law's rank; odds of 19 at 2 · 19^(1/4) = 4.18 times.
BOUNDARY = SuccessBoundary(2.0, 4.0, trials=20, certified=10, share_range=(0.1, 100.0))
RUN = Run(
    kind="random", rank=1, length=1, seed=0, modules=("down_proj",), layers=(4,), records=1, parameters=1, bits=1.0,
    cost_bits=1.0, base_loss=12.0, final_loss=0.0, ordered=0.25, certified=False, steps=1, visits=1, training_s=1.0,
    elapsed_s=1.0, conditions={"base_model": "tiny", "base_weights": "0" * 12, "objective": "sft"},
)  # fmt: skip
