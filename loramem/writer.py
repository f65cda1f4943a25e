"""The training loop: records, a rank and an objective in; an adapter whose every answer token is certified out.

It stops when every answer token and end token of every record has p >= ``certify_threshold`` under teacher forcing,
never at an epoch count. When progress stops, the rank grows in place; at the highest rank it gives up and says which
records are left.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loramem import objectives
from loramem.adapters import AdaptedModel, Placement, count_parameters, load_weights, rank_choices
from loramem.batches import answer_logits, group_by_length, make_batch, token_losses
from loramem.errors import TrainingDiverged
from loramem.prompts import EncodedRecord
from loramem.recall import answer_probabilities

log = logging.getLogger(__name__)

OBJECTIVES = ("sft", "memft-ot", "memft-sw")
OPTIMIZERS = ("muon", "adamw")


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
    optimizer: str = "adamw"
    learning_rate: float = 1e-2
    batch_records: int = 25
    batch_tokens: int = 8192
    """Most tokens in a batch, padding included."""
    max_grad_norm: float = 1.0
    long_tokens: int = 200
    """A shard of a single answer longer than this is trained with the sliding window."""
    patience_passes: int = 40
    """Passes over the exposed records without progress before the rank grows."""
    max_rank: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, not {self.objective!r}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {self.optimizer!r}")
        if not 0.5 <= self.certify_threshold <= self.train_threshold < 1:
            raise ValueError(
                "thresholds must satisfy 0.5 <= certify_threshold <= train_threshold < 1, not "
                f"{self.certify_threshold} and {self.train_threshold}"
            )


@dataclass(frozen=True)
class WriteProgress:
    """What a progress callback is told after every step."""

    step: int
    tokens_ordered: int
    """Answer and end tokens at or above the certified probability when last seen."""
    tokens_total: int
    min_prob: float
    """Lowest probability among tokens seen so far; 0 while some were never seen."""
    loss: float
    """Mean cross-entropy of the last batch in nats per token."""
    rank: int
    elapsed_s: float
    shard: int = 1
    shards: int = 1


ProgressCallback = Callable[[WriteProgress], None]


@dataclass(frozen=True)
class Training:
    """The outcome of training one shard."""

    stubborn: tuple[int, ...]
    """Indices of records that are not certified; empty when the shard is done."""
    rank: int
    parameters: int
    steps: int
    visits: int
    """Times a record was in a training batch, over all records."""
    elapsed_s: float


def train_adapter(
    adapted: AdaptedModel,
    name: str,
    records: Sequence[EncodedRecord],
    rank: int,
    placement: Placement,
    settings: WriterSettings,
    progress: ProgressCallback | None = None,
) -> Training:
    """Train a new adapter ``name`` until every token of every record is certified.

    The adapter is left attached and active as training left it, certified or not.

    Raises:
        TrainingDiverged: NaN or Inf, again after three restarts at lower learning rates.
    """
    adapted.create(name, rank, placement, settings.seed)
    run = _Run(adapted, name, records, rank, settings, progress)
    for next_rank in [*rank_choices(rank, settings.max_rank)[1:], None]:
        if run.until_certified_or_stalled() or next_rank is None:
            break
        log.info("no progress at rank %d with %d tokens left; growing to %d", run.rank, run.unordered, next_rank)
        adapted.grow(name, next_rank, placement, settings.seed + next_rank)
        run.restart(next_rank)
    return Training(
        stubborn=tuple(run.stubborn_records()),
        rank=run.rank,
        parameters=count_parameters(adapted.weights(name)),
        steps=run.step,
        visits=run.visits,
        elapsed_s=time.monotonic() - run.started,
    )


def make_optimizer(
    parameters: Sequence[nn.Parameter], settings: WriterSettings, learning_rate: float
) -> torch.optim.Optimizer:
    """The optimiser over LoRA matrices, without weight decay (torch's Muon has 0.1 by default)."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    return torch.optim.Muon(parameters, lr=learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")


class _Run:
    """State of one training: what was seen of every record, the optimiser, the last good weights."""

    def __init__(
        self,
        adapted: AdaptedModel,
        name: str,
        records: Sequence[EncodedRecord],
        rank: int,
        settings: WriterSettings,
        progress: ProgressCallback | None,
    ) -> None:
        self.adapted, self.name, self.records, self.settings = adapted, name, records, settings
        self.progress = progress
        self.generator = torch.Generator().manual_seed(settings.seed)
        # A fixed order for the whole run: the curriculum exposes growing prefixes of it (reference code, PhoneBook).
        self.order = torch.randperm(len(records), generator=self.generator).tolist()
        self.started = time.monotonic()
        self.step = self.visits = 0
        self.total_tokens = sum(len(record.answer_ids) for record in records)
        self.probs: list[Tensor] = [torch.zeros(len(record.answer_ids)) for record in records]
        single_long = len(records) == 1 and records[0].length > settings.long_tokens
        self.sliding = objectives.SlidingState.start(1, adapted.base.device) if single_long else None
        self.learning_rate = settings.learning_rate
        self.restart(rank)

    def restart(self, rank: int) -> None:
        """A new optimiser for (re)created parameters; exposure and what was seen are kept."""
        self.rank = rank
        self.parameters = self.adapted.trainable()
        self.optimizer = make_optimizer(self.parameters, self.settings, self.learning_rate)
        self.best_unordered, self.best_loss, self.idle_passes = math.inf, math.inf, 0
        self.remember()

    def remember(self) -> None:
        self.last_good = {key: tensor.clone() for key, tensor in self.adapted.weights(self.name).items()}

    @property
    def unordered(self) -> int:
        return sum(int((probs < self.settings.certify_threshold).sum()) for probs in self.probs)

    def stubborn_records(self) -> list[int]:
        return [i for i, probs in enumerate(self.probs) if float(probs.min()) < self.settings.certify_threshold]

    def until_certified_or_stalled(self) -> bool:
        """Train passes over the exposed records; True when everything is certified, False when progress stopped."""
        ratio = objectives.RATIOS[0] if self.uses_curriculum else 1.0
        while self.idle_passes < self.settings.patience_passes:
            exposed = self.order[: max(1, math.ceil(len(self.order) * ratio))]
            loss = self.train_pass(exposed)
            if loss is None:
                self.recover()
                continue
            ordered_share = self.ordered_share(exposed)
            if ratio == 1.0 and self.unordered == 0 and self.check():
                return True
            grown = objectives.grown_exposure(ratio, ordered_share)
            self.note_progress(loss, grew=grown > ratio)
            ratio = grown
            self.remember()
        self.check()
        return False

    @property
    def uses_curriculum(self) -> bool:
        return (
            self.settings.objective == "memft-sw"
            and self.settings.curriculum
            and len(self.records) >= 2 * self.settings.batch_records
        )

    def train_pass(self, exposed: Sequence[int]) -> float | None:
        """One pass over the exposed records; mean loss in nats per token, or None at the first NaN or Inf."""
        shuffled = [exposed[i] for i in torch.randperm(len(exposed), generator=self.generator).tolist()]
        total_loss, total_tokens = 0.0, 0
        for batch in self.batches(shuffled):
            loss = self.train_step(batch)
            if loss is None:
                return None
            tokens = sum(len(self.records[i].answer_ids) for i in batch)
            total_loss, total_tokens = total_loss + loss * tokens, total_tokens + tokens
        return total_loss / total_tokens

    def batches(self, shuffled: Sequence[int]) -> list[list[int]]:
        """Batches of random composition: a pool of a few batches is sorted by length, then cut and shuffled."""
        pool = 8 * self.settings.batch_records
        cut = [
            batch
            for start in range(0, len(shuffled), pool)
            for batch in group_by_length(
                self.records, shuffled[start : start + pool], self.settings.batch_records, self.settings.batch_tokens
            )
        ]
        return [cut[i] for i in torch.randperm(len(cut), generator=self.generator).tolist()]

    def train_step(self, indices: Sequence[int]) -> float | None:
        batch = make_batch([self.records[i] for i in indices], self.adapted.base.device)
        logits = answer_logits(self.adapted.model, batch)
        losses = token_losses(logits, batch)
        mean_loss = float(objectives.weighted_mean(losses.detach(), objectives.sft(losses, batch.supervised)))
        if not math.isfinite(mean_loss):
            return None
        weights = self.weights(losses, logits, batch.supervised, batch.targets)
        self.optimizer.zero_grad()
        objectives.weighted_mean(losses, weights).backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        if not torch.isfinite(norm):
            return None
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * self.rate_factor()
        self.optimizer.step()
        self.see(indices, losses.detach())
        self.step += 1
        self.visits += len(indices)
        self.report(mean_loss)
        return mean_loss

    def weights(self, losses: Tensor, logits: Tensor, supervised: Tensor, targets: Tensor) -> Tensor:
        if self.settings.objective == "sft":
            return objectives.sft(losses, supervised)
        if self.settings.objective == "memft-sw" and self.sliding is not None:
            correct = logits.argmax(-1) == targets
            weights, self.sliding = objectives.memft_sw(
                losses, supervised, correct, self.sliding, self.settings.train_threshold
            )
            return weights
        return objectives.memft_ot(losses, supervised, self.settings.train_threshold)

    def rate_factor(self) -> float:
        """Learning rate as a share of its start, tied to progress: the last tokens settle only when it falls.

        It falls with the share of tokens that are not ordered yet, and further while nothing improves.
        """
        share = self.unordered / self.total_tokens
        return float(min(1.0, max(0.1, share / 0.1)) * 0.5 ** (self.idle_passes / 10))

    def see(self, indices: Sequence[int], losses: Tensor) -> None:
        """Keep the probabilities the training forward computed anyway (of the weights before this step)."""
        probs = torch.exp(-losses).cpu()
        for row, index in enumerate(indices):
            self.probs[index] = probs[row, -len(self.records[index].answer_ids) :]

    def check(self) -> bool:
        """Teacher-forced probabilities of all records with the weights as they are now; True if all certified."""
        for index, probs in answer_probabilities(self.adapted.model, self.records):
            self.probs[index] = probs
        return self.unordered == 0

    def ordered_share(self, indices: Sequence[int]) -> float:
        ordered = sum(int((self.probs[i] >= self.settings.certify_threshold).sum()) for i in indices)
        return ordered / sum(len(self.records[i].answer_ids) for i in indices)

    def note_progress(self, loss: float, *, grew: bool) -> None:
        """Progress is fewer stubborn tokens, a loss 1 % lower, or more records exposed."""
        unordered = self.unordered
        if grew or unordered < self.best_unordered or loss < 0.99 * self.best_loss:
            self.idle_passes = 0
        else:
            self.idle_passes += 1
        if grew:  # newly exposed records raise the loss; compare from here on
            self.best_loss = math.inf
        self.best_unordered = min(unordered, self.best_unordered)
        self.best_loss = min(loss, self.best_loss)

    def recover(self) -> None:
        """After NaN or Inf: the last good weights, half the learning rate, a fresh optimiser."""
        self.learning_rate /= 2
        log.warning(
            "loss is not finite at step %d; back to the last good state at rate %g", self.step, self.learning_rate
        )
        if self.learning_rate < self.settings.learning_rate / 8:
            raise TrainingDiverged(
                f"Training diverged at step {self.step}, also at learning rate {self.learning_rate * 2:g}. "
                "Nothing was committed. Check the base model for NaN weights, or lower the learning rate.",
                step=self.step,
                learning_rate=self.learning_rate * 2,
            )
        load_weights(self.adapted.weights(self.name), self.last_good)
        self.optimizer = make_optimizer(self.parameters, self.settings, self.learning_rate)

    def report(self, loss: float) -> None:
        if self.progress is None:
            return
        self.progress(
            WriteProgress(
                step=self.step,
                tokens_ordered=self.total_tokens - self.unordered,
                tokens_total=self.total_tokens,
                min_prob=min(float(probs.min()) for probs in self.probs),
                loss=loss,
                rank=self.rank,
                elapsed_s=time.monotonic() - self.started,
            )
        )
