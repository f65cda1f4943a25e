"""What the store answers with: plain, frozen, JSON-able with ``dataclasses.asdict``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loramem._util.explained import Certainty, as_html, certainty


@dataclass(frozen=True)
class Divergence:
    """How far an adapter moves its base at positions that training never saw."""

    positions: int
    kl: float
    """Mean KL(base ‖ adapted) in nats."""
    changed: float
    """Share of the positions with another likeliest token."""


@dataclass(frozen=True)
class Kept:
    """What an adapter, as saved and active for everything, leaves of its base: a second certificate."""

    text: Divergence
    """Every token of neutral text."""
    answers: Divergence
    """Every token of the base's own answers to ordinary questions."""
    questions: Divergence
    """The first token of each of these."""
    unknown_keys: Divergence
    """The first token of the answer to keys of the same form that were never written."""
    same_answers: float
    """Share of the questions that get the same answer, decoded greedily for 24 tokens."""
    other_words: tuple[int, int] | None = None
    """Of records that have questions: how many give their value when they are asked in words that were not trained, and
    how many were asked so."""
    refused: tuple[int, int] | None = None
    """Where unknown keys have an answer of their own: how many of ``unknown_keys`` were given it, decoded greedily to
    the end, and how many were asked."""
    other_contexts: tuple[int, int] | None = None
    """Where records were trained in chats: how many give their value in one that was not trained, and how many were
    asked so. Questions and unknown keys were asked in the trained chats too, as many in each as without one."""

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Kept":
        """From what ``dataclasses.asdict`` made of one."""
        counts = {name: fields.get(name) for name in ("other_words", "refused", "other_contexts")}
        return cls(
            text=Divergence(**fields["text"]),
            answers=Divergence(**fields["answers"]),
            questions=Divergence(**fields["questions"]),
            unknown_keys=Divergence(**fields["unknown_keys"]),
            same_answers=fields["same_answers"],
            **{name: None if count is None else (count[0], count[1]) for name, count in counts.items()},
        )


@dataclass(frozen=True)
class WriteReport:
    """A committed write."""

    written: int
    """Records; their questions are counted apart."""
    skipped: int
    """Records that were in the store already, or twice in the input, with the same value."""
    failed: tuple[str, ...]
    """Keys and questions that could not be certified; only with ``partial=True``."""
    adapters: tuple[str, ...]
    rank: int
    """The largest rank of the new adapters."""
    exact_match: float | None
    """Share of the new records that were decoded exactly from the adapters as saved; None if there were none."""
    min_prob: float | None
    """Lowest probability of any answer or end token, teacher-forced on the adapters as saved; None if none was."""
    parameters: int
    cost_bits: float
    """Σ max(0, −log2 p_base − 1) over the answer tokens: what the base did not know."""
    steps: int
    visits: int
    """Records in training batches, over all steps."""
    training_s: float
    elapsed_s: float
    """Planning, training, saving, proof and commit; loading the base model apart."""
    needs_ids: int = 0
    """Records that a chat server would ask for by other ids than were trained: give it ids in place of the key."""
    served: Mapping[str, float] = field(default_factory=dict)
    """`min_prob` in each other dtype that the store is written for, base model and adapters cast to it."""
    kept: Mapping[str, Kept] = field(default_factory=dict)
    """By adapter, what it leaves of the base; where ``keep_base`` asked for it."""
    beside: int = 0
    """Where one adapter was asked for: those that its namespaces have from before. `compact` makes one of all."""
    questions: int = 0
    """Of the records, and of records that were there before."""
    contexts: int = 0
    """Chats in each of which every record and question was decoded as well, from the adapters as saved; ``min_prob`` is
    of these too."""

    @property
    def bits_per_parameter(self) -> float:
        return self.cost_bits / self.parameters if self.parameters else 0.0

    @classmethod
    def nothing(cls, skipped: int) -> "WriteReport":
        """Everything was in the store already, or there were no records: nothing was decoded, nothing is claimed."""
        return cls(0, skipped, (), (), 0, None, None, 0, 0.0, 0, 0, 0.0, 0.0)


@dataclass(frozen=True)
class Recall:
    """A value decoded from the weights and equal to what was committed."""

    key: str
    value: str
    min_prob: float
    """The record's certificate, proved when it was written."""
    adapter: str
    prompt_tokens: int
    answer_tokens: int
    """The end token not counted."""


@dataclass(frozen=True)
class TokenProbability:
    """One answer token under teacher forcing."""

    text: str
    id: int
    prob: float
    base_prob: float
    """The same without the adapter."""
    ordered: bool
    """prob > 0.5: greedy decoding cannot choose another token here."""

    @property
    def certainty(self) -> Certainty:
        """ "certain" (p ≥ 0.9), "near" (above 0.5) or "below"."""
        return certainty(self.prob)


@dataclass(frozen=True)
class Explanation:
    """Why a value is recalled; the last token is the end token."""

    key: str
    value: str
    adapter: str
    tokens: tuple[TokenProbability, ...]
    kept: Kept | None = None
    """What its adapter leaves of the base, where it was written to keep it."""
    contexts: int = 0
    """Chats in each of which its adapter was proved to give the value as well."""

    @property
    def min_prob(self) -> float:
        return min(token.prob for token in self.tokens)

    def _repr_html_(self) -> str:
        return as_html(self.key, self.adapter, ((token.text, token.prob, token.base_prob) for token in self.tokens))


@dataclass(frozen=True)
class Version:
    """A record as it is or once was; values are not part of it."""

    namespace: str
    key: str
    written_at: str
    """UTC, ISO 8601."""
    ended_at: str | None
    """None for the record that is recalled now."""
    ended_by: str | None
    """"replaced", "deleted" or "renamed"."""
    successor: str | None
    """The new key, if it was renamed."""
    adapter: str
    answer_tokens: int
    min_prob: float
    in_weights: bool
    """Whether a file of the store still holds the value in an adapter."""


@dataclass(frozen=True)
class CompactReport:
    """What `MemoryStore.compact` did."""

    records: int
    """Live records that were written anew."""
    adapters_before: int
    """Adapters that were taken apart."""
    adapters_after: int
    """Those that hold their live records now."""
    parameters_before: int
    parameters_after: int
    min_prob: float | None
    """Lowest probability of any answer or end token of these records; None if none was written."""
    elapsed_s: float


@dataclass(frozen=True)
class GcReport:
    """What `MemoryStore.gc` removed."""

    adapters: int
    freed_bytes: int
    kept: int
    """Adapters that no live record needs, kept for readers until the grace is over."""


@dataclass(frozen=True)
class EraseReport:
    """What `MemoryStore.erase` did."""

    keys: int
    records: int
    """Live records that shared an adapter with them, and were written anew."""
    adapters: int
    """Adapters that were removed."""
    elapsed_s: float


@dataclass(frozen=True)
class RepairReport:
    """What `MemoryStore.repair` did."""

    repaired: int
    """Records that were written anew because their adapter or row was damaged."""
    adapters: int
    """Adapters that were damaged."""
    lost: tuple[str, ...]
    """Keys whose value is neither kept nor recalled: they stay in the index and raise an error when recalled."""
    missing: int
    """Records that adapters were written with and that the index has no row for."""
    elapsed_s: float


@dataclass(frozen=True)
class VerifyReport:
    """What `MemoryStore.verify` found."""

    records: int
    exact: int | None
    """Records whose decoded value is the committed one; None if none was decoded (``quick``)."""
    failed: tuple[str, ...]
    """Keys whose value did not come back."""
    damaged: tuple[str, ...]
    """Files and rows that are not as committed."""
    elapsed_s: float
    resumed: int = 0
    """Records that an interrupted verify had decoded, which this one took over (``resume``)."""

    @property
    def ok(self) -> bool:
        return not self.failed and not self.damaged


@dataclass(frozen=True)
class Finding:
    """What a server would make of an adapter that is not simply to load it."""

    target: str
    """"peft", "vllm" or "sglang"."""
    adapter: str | None
    """None where it concerns all of them together."""
    rule: str
    """A word: "rank", "bias", "base"…"""
    refused: bool
    """False for a note: the server takes the adapter if it is started as the remedy says."""
    what: str
    """The offending value, in words."""
    why: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why}. {self.remedy}"


@dataclass(frozen=True)
class AdapterCheck:
    """The certificates of one adapter, looked at again: what `loramem.store.certificates` found."""

    adapter: str
    records: int
    """Live records of the adapter."""
    exact: int
    """Those decoded exactly, end token included, in every batch composition."""
    failed: tuple[str, ...]
    """Keys of the others."""
    unscored: int
    """Failed records whose value is not kept, so that nothing could be scored."""
    min_prob: float | None
    """Lowest teacher-forced p of any answer or end token of the records that were scored, over several compositions of
    batches, each record alone among them; None if none was. A server's batches are others."""
    committed_min_prob: float | None
    """Lowest certificate of the same records, as committed; None without records."""
    dtypes: dict[str, str]
    """Of "base" and "adapter"."""
    device: str
    batches: dict[str, list[int]]
    """Records per batch, by composition: those that a certificate rests on."""

    @property
    def ok(self) -> bool:
        return not self.failed

    @property
    def margin(self) -> float | None:
        """What is left of the lowest p that was seen above 0.5, where greedy decoding cannot choose otherwise."""
        return None if self.min_prob is None else self.min_prob - 0.5


@dataclass(frozen=True)
class ChatKeys:
    """Which keys of a store a chat server may be asked for as the user's message."""

    safe: int
    """Those whose ids there are the ones that were trained."""
    needs_ids: tuple[str, ...]
    """Those that must be asked by ids, since the chat template gives others: the key alone would get another answer."""
    unknown: int
    """Those written before this was looked at."""


@dataclass(frozen=True)
class ServingReport:
    """What `MemoryStore.check` found: whether servers take the adapters, and what certificates are worth there."""

    targets: tuple[str, ...]
    adapters: dict[str, int]
    """Rank by name of the adapter's folder."""
    findings: tuple[Finding, ...]
    certificates: tuple[AdapterCheck, ...]
    """Empty unless a dtype was asked for."""
    chat: ChatKeys | None = None
    """None for folders, and for a base model without a chat template, where every prompt is given as ids."""

    def refused(self, target: str, adapter: str) -> bool:
        """Whether the server would refuse this adapter, or serve something else than was written."""
        return any(
            finding.refused and finding.target == target and finding.adapter in (adapter, None)
            for finding in self.findings
        )

    @property
    def ok(self) -> bool:
        return not any(finding.refused for finding in self.findings) and all(one.ok for one in self.certificates)


@dataclass(frozen=True)
class ServerCheck:
    """One adapter as a server answers from it: every live record asked, every answer compared."""

    adapter: str
    records: int
    exact: int
    """Those whose value came back and ended there."""
    failed: Mapping[str, str]
    """Why the others did not, by key."""
    min_prob: float | None
    """Lowest p of any answer or end token of the exact ones, as the server tells it; None where it tells none."""
    committed_min_prob: float | None
    """Lowest certificate of the records, as committed."""


@dataclass(frozen=True)
class ServerReport:
    """What `MemoryStore.check_server` found."""

    url: str
    target: str
    """What the server is."""
    adapters: tuple[ServerCheck, ...]

    @property
    def ok(self) -> bool:
        return not any(one.failed for one in self.adapters)


@dataclass(frozen=True)
class DeployReport:
    """What `MemoryStore.deploy` wrote."""

    folder: str
    adapters: tuple[str, ...]
    """Names that requests route by: the ids of the store's adapters."""
    rank: int
    """The largest rank, padding included."""
    dtype: str
    base_name: str
    size_bytes: int
    findings: tuple[Finding, ...]
    """Notes: how the server must be started."""
    chat: ChatKeys | None = None
    """None for a base model without a chat template."""


@dataclass(frozen=True)
class Stats:
    """Counts and sizes of a store."""

    base_model: str
    law: str | None
    """Kinds of data for which a memory law of the base model is known, joined by commas."""
    namespaces: int
    records: int
    questions: int
    """That ask for records beside their keys."""
    tombstones: int
    """Records that were replaced, deleted or renamed, and that an adapter's weights still hold."""
    adapters: int
    ranks: list[int]
    parameters: int
    answer_tokens: int
    cost_bits: float
    bits_per_parameter: float
    """Cost of the values over adapter parameters: an estimate, since shared format is counted per record."""
    min_prob: float | None
    size_bytes: int
    """All files of the store."""
    retired_adapters: int
    retired_bytes: int
    """Of adapters that no live record needs, which `gc` removes after its grace."""
    advice: str | None
    """What compaction would do for the store, if it pays."""
    unfinished_records: int
    """Records of an interrupted write that waits to be resumed or discarded."""


@dataclass(frozen=True)
class PushPlan:
    """What a push would send, before anything is sent."""

    repo: str
    private: bool
    """Whether those alone who may read the repository can extract the records."""
    records: int
    """That become extractable by whoever may read the repository."""
    keys: bool
    """Whether the keys go along as text."""
    values: bool
    """Whether the values go along as text."""
    adapters: int
    uploaded: tuple[str, ...]
    """Adapters that the repository does not have."""
    removed: tuple[str, ...]
    """Adapters that it has and the store has no more; the repository's history keeps them."""
    size_bytes: int
    """Of the adapters to upload."""


@dataclass(frozen=True)
class PushReport(PushPlan):
    """A finished push: what was planned, and the commit that it made."""

    commit: str
    """That the repository is at now."""
    changed: bool
    """False where it held all of it already."""
