"""How an adapter is trained: every choice of the writer, with its measured default."""

from dataclasses import dataclass

OBJECTIVES = ("sft", "memft-ot", "memft-sw")
OPTIMIZERS = ("muon", "adamw")
STARTS = ("gradient", "random")
PRECISIONS = ("auto", "float32", "bfloat16")
MAX_RANK = 128
"""Highest rank of an adapter where nobody allows more. Servers have maxima of their own (`loramem.targets`)."""


@dataclass(frozen=True)
class WriterSettings:
    """How an adapter is trained. Defaults are measured; docs/writing.md holds the tables.

    Raises:
        ValueError: A contradiction, or a name that is not known.
    """

    objective: str = "memft-sw"
    """"sft", "memft-ot" or "memft-sw"; the last takes the sliding window for records longer than ``long_tokens``."""
    curriculum: bool = False
    """memft-sw only: expose 20 % of the records first, and more once 90 % of the exposed tokens are ordered. Off by
    default: it cost steps in every cell of the ablation (docs/writing.md)."""
    train_threshold: float = 0.9
    """Probability that training aims at; above what is certified, or tokens hover at the boundary."""
    certify_threshold: float = 0.6
    """Probability that every answer token and end token must reach."""
    start: str = "gradient"
    """Where A begins: "gradient" (`loramem.initialization`) or "random"; B is zero in both."""
    optimizer: str = "adamw"
    learning_rate: float = 0.06
    """Relative: the share of a module's output that one step can change (`loramem.optimizer`); the same for every base
    model and rank."""
    feature_rate: float = 0.2
    """Of training behind the last attention, relative (`loramem.whitening`): the share of an adapter's entries, and of
    what its output is added to, that one step can change."""
    batch_records: int = 25
    batch_tokens: int = 8192
    """Most tokens in a batch, padding included."""
    precision: str = "auto"
    """Of the matrix products in training: "float32", "bfloat16" (autocast; adapter weights, losses and every check
    stay float32), "auto" takes bfloat16 where the processor multiplies it natively."""
    max_grad_norm: float = 1.0
    long_tokens: int = 200
    """A shard of a single answer longer than this is trained with the sliding window."""
    patience_passes: int = 40
    """Steps without progress before the rank grows, in passes over all records."""
    max_rank: int = MAX_RANK
    """Highest rank: of the first one asked for, of plans, and of what training grows to."""
    restarts: int = 2
    """How often training may begin again at a third of the rate, where progress stops with most tokens open."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, not {self.objective!r}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {self.optimizer!r}")
        if self.start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(STARTS)}, not {self.start!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {self.precision!r}")
        if self.max_rank < 1:
            raise ValueError(f"max_rank must be at least 1, not {self.max_rank}")
        if not 0.5 <= self.certify_threshold <= self.train_threshold < 1:
            raise ValueError(
                "thresholds must satisfy 0.5 <= certify_threshold <= train_threshold < 1, not "
                f"{self.certify_threshold} and {self.train_threshold}"
            )
