"""How an adapter is trained: every choice of a write, with its measured default."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from loramem._util.choices import check_choice
from loramem.errors import ArgumentError, StoreFormatError
from loramem.records.contexts import Context, saved_contexts

ObjectiveName = Literal["sft", "memft-ot", "memft-sw"]
OBJECTIVES: tuple[ObjectiveName, ...] = get_args(ObjectiveName)
"""What each of them is, `loramem.training.objectives` says."""
MAX_RANK = 128
"""Highest rank of an adapter where nobody allows more. Servers have maxima of their own (`loramem.serving.rules`)."""
RETIRED = frozenset(
    "curriculum start optimizer learning_rate batch_records batch_tokens precision max_grad_norm patience_passes "
    "restarts".split()
)
"""Settings that once tuned training through the network, and that stores and journals may still name."""

RETIRED_KEEPING = frozenset(("steps", "rate", "weight"))
"""The same of `KeepBase`: they were of training that looked at neutral positions in every step."""

OnMiss = Literal["report", "fail", "grow"]
"""What becomes of a write that leaves less of the base than is wanted: it is committed and says so, it is refused, or
it is trained again with more until the highest rank, and then refused."""


@dataclass(frozen=True)
class KeepBase:
    """How much of a base is to be left as it is, and what is done for it. Measured defaults: docs/keeping.md.

    Raises:
        ArgumentError: A number that makes no sense.
        UnknownChoice: No such way.
    """

    neurons: int | None = None
    """Of the last MLP, which the records take at first: the adapter's first rank. None: one for each record and a few
    more, but no more than an eleventh of all."""
    text_tokens: int = 20_000
    questions: int = 300
    """Answered by the base, to set gates against; of three times as many, where an answer begins."""
    unknown_keys: int = 3_000
    """Of the records' own form, to set gates against."""
    unknown: str = ""
    """What an unknown key is answered, such as "I don't know."; nothing leaves it the base's own answer."""
    text_sha256: str = ""
    """Of a text of the user's own, which `loramem.training.neutral_text.remember_text` put into the cache: it is read
    first, as text that is to stay what it is, and the standard library's after it."""
    text_kl: float = 0.1
    """Target: mean KL(base ‖ adapted) in nats on text."""
    text_changed: float = 0.08
    """Target: share of positions of text with another likeliest token."""
    questions_changed: float = 0.1
    """Target: share of questions whose answer begins with another token."""
    unknown_changed: float = 0.05
    """Target: share of unknown keys whose answer begins with another token, or is not ``unknown``."""
    on_miss: OnMiss = "report"

    def __post_init__(self) -> None:
        check_choice("on_miss", self.on_miss, get_args(OnMiss))
        for name in ("neurons", "text_tokens", "questions", "unknown_keys"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ArgumentError(
                    f"{name} must be at least 1, not {getattr(self, name)}", argument=name, value=getattr(self, name)
                )


@dataclass(frozen=True)
class WriterSettings:
    """How an adapter is trained, behind the last attention and through the network alike unless a field says so.

    Raises:
        UnknownChoice: No such objective.
        ArgumentError: A contradiction.
    """

    objective: ObjectiveName = "memft-sw"
    """One of `OBJECTIVES`; "memft-sw" takes the sliding window for records longer than ``long_tokens``."""
    train_threshold: float = 0.9
    """Probability that training aims at; above what is certified, or tokens hover at the boundary."""
    certify_threshold: float = 0.6
    """Probability that every answer token and end token must reach."""
    feature_rate: float = 0.2
    """Of training behind the last attention alone, relative (`loramem.training.whitening`): the share of an adapter's
    entries, and of what its output is added to, that one step can change."""
    long_tokens: int = 200
    """A shard of a single answer longer than this is trained with the sliding window."""
    max_rank: int = MAX_RANK
    """Highest rank: of the first one asked for, of plans, and of what training grows to."""
    seed: int = 0
    """Of random directions in new rows of A; through the network also of the order of batches."""
    keep_base: KeepBase | None = None
    """What is left of the base where an adapter is active for everything; None for adapters that are routed to."""
    contexts: tuple[Context, ...] = ()
    """Chats in which every record is trained and proved beside its key alone (`loramem.records.contexts`)."""

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, OBJECTIVES)
        if self.max_rank < 1:
            raise ArgumentError(
                f"max_rank must be at least 1, not {self.max_rank}", argument="max_rank", value=self.max_rank
            )
        if not 0.5 <= self.certify_threshold <= self.train_threshold < 1:
            raise ArgumentError(
                "thresholds must satisfy 0.5 <= certify_threshold <= train_threshold < 1, not "
                f"{self.certify_threshold} and {self.train_threshold}",
                argument="certify_threshold",
                value=self.certify_threshold,
            )

    def to_json(self) -> dict[str, Any]:
        """As a journal or an adapter's row has them; ``keep_base`` and ``contexts`` are named only where they were
        asked for, so that older versions read all that they can rewrite."""
        return {name: value for name, value in asdict(self).items() if value or name not in ("keep_base", "contexts")}

    @classmethod
    def saved(cls, settings: Mapping[str, Any]) -> "WriterSettings":
        """Settings as a journal, an adapter's row or a manifest holds them, without those that were `RETIRED` since.

        Raises:
            StoreFormatError: There are others, of a newer version.
        """
        kept = {name: value for name, value in settings.items() if name not in RETIRED}
        if unknown := kept.keys() - cls.__dataclass_fields__:
            raise StoreFormatError(
                f"The store was written with the setting {min(unknown)!r}, which this version of loramem does not "
                "know. Upgrade loramem."
            )
        keep = kept.get("keep_base")
        if keep is not None:
            keep = {name: value for name, value in keep.items() if name not in RETIRED_KEEPING}
        if keep is not None and (unknown := keep.keys() - KeepBase.__dataclass_fields__):
            raise StoreFormatError(
                f"The store was written with the setting keep_base.{min(unknown)}, which this version of loramem does "
                "not know. Upgrade loramem."
            )
        contexts = saved_contexts(kept.get("contexts", ()))
        return cls(**{**kept, "keep_base": None if keep is None else KeepBase(**keep), "contexts": contexts})
