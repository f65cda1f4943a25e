"""Training over features: an adapter behind the last attention, written without a pass through the network.

`loramem.features` holds what the adapted modules see at every answer position. Training is then an optimisation over
these N vectors alone: whitened coordinates (`loramem.whitening`), all positions in every step, and a softmax over the
few tokens that compete. That softmax is too sure of itself, so it decides nothing: what ends training is a full check
over the whole vocabulary, whose rivals join the few.

What will be served differs from what is trained by rounding: another dtype moves the features by one or two percent.
So features of every dtype to be served are collected, and each step adds to a position the deviation of another one.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from loramem import objectives
from loramem.adapters import AdaptedModel, count_parameters, load_weights, rank_choices
from loramem.errors import TrainingDiverged
from loramem.features import Ending, Features
from loramem.placement import Placement
from loramem.settings import WriterSettings
from loramem.whitening import Site, WhitenedAdam, random_rows, whitening_factor
from loramem.writer import ProgressCallback, Training, WriteProgress

log = logging.getLogger(__name__)

FIRST_RIVALS, NEW_RIVALS = 5, 3
"""Likeliest tokens of every position that join the softmax before training, and at every full check."""
TRAIN_ROWS, CHECK_ROWS = 4096, 1024
CHECK_STEPS = 50
"""Steps after which the whole vocabulary is looked at, although tokens are open in the softmax over few."""
RECHECK_STEPS = 3
"""Steps after a check before the next, where none is open in the softmax over few."""
LEAST_SHARE = 0.05
"""With fewer than a tenth of the tokens open the rate falls with their share, down to this part of it."""
IDLE_DECAY, IDLE_STEPS = 40, 160
"""Steps without progress after which the rate is halved, and after which the rank grows."""
MIN_DECAY = 1 / 16


def train_on_features(
    adapted: AdaptedModel,
    name: str,
    features: Sequence[Features],
    records: int,
    rank: int,
    placement: Placement,
    settings: WriterSettings,
    progress: ProgressCallback | None = None,
    *,
    adapter_dtypes: Sequence[torch.dtype] = (),
    caution: float = 1.0,
) -> Training:
    """As `loramem.writer.train_adapter`, for a placement behind the last attention.

    Args:
        features: Of the same records in every dtype that is to be served, the model's own first.
        records: How many there are.
        adapter_dtypes: What the adapter is cast to where each of ``features`` is served; float32 for all if empty.
        caution: Factor on the deviations between dtypes that training adds.

    Raises:
        TrainingDiverged: NaN or Inf, in the features or again after several restarts at lower rates.
    """
    started = time.monotonic()
    adapted.create(name, rank, placement, settings.seed)
    run = _Run(adapted, name, features, records, rank, settings, progress, started, adapter_dtypes, caution)
    for next_rank in [*rank_choices(rank, settings.max_rank)[1:], None]:
        if run.until_certified_or_stalled() or next_rank is None:
            break
        log.info("no progress at rank %d with %d tokens left; growing to %d", run.rank, run.open, next_rank)
        adapted.grow(name, next_rank, placement, settings.seed + next_rank)
        run.attach(next_rank, grown_from=run.rank)
    return Training(
        stubborn=run.stubborn_records(),
        rank=run.rank,
        parameters=count_parameters(adapted.weights(name)),
        steps=run.step,
        visits=run.step * records,
        elapsed_s=time.monotonic() - started,
    )


class Rivals:
    """The tokens of the softmax over few, and the rows of the unembedding that give their logits."""

    def __init__(self, head: torch.nn.Module, targets: Tensor) -> None:
        parameters = dict(head.named_parameters())
        self._weight, self._bias = parameters["weight"].detach(), parameters.get("bias")
        self._place = torch.full((len(self._weight),), -1, device=targets.device)
        self._ids = targets.new_empty(0)
        self._all_targets = targets
        self.add(targets)

    def add(self, tokens: Tensor) -> int:
        """Let more tokens compete; returns how many were new."""
        new = tokens.unique()
        new = new[self._place[new] < 0]
        self._place[new] = torch.arange(len(self._ids), len(self._ids) + len(new), device=new.device)
        self._ids = torch.cat([self._ids, new])
        self.head = self._weight[self._ids], None if self._bias is None else self._bias.detach()[self._ids]
        self.targets = self._place[self._all_targets]
        """(N,) places of the targets among the competing tokens."""
        return len(new)

    def rest(self, logits: Tensor) -> Tensor:
        """log Σ exp (n,) over the tokens that do not compete, of logits (n, V) over the whole vocabulary."""
        return logits.index_fill(1, self._ids, -math.inf).logsumexp(1)


@dataclass
class _Best:
    """The least that was open, and when."""

    tokens: float = math.inf
    loss: float = math.inf
    step: int = 0


class _Run:
    """State of one training."""

    def __init__(
        self,
        adapted: AdaptedModel,
        name: str,
        features: Sequence[Features],
        records: int,
        rank: int,
        settings: WriterSettings,
        progress: ProgressCallback | None,
        started: float,
        adapter_dtypes: Sequence[torch.dtype],
        caution: float,
    ) -> None:
        self.adapter_dtypes = adapter_dtypes or [torch.float32] * len(features)
        self.caution = caution
        self.adapted, self.name, self.features, self.records = adapted, name, features, records
        self.settings, self.progress, self.started = settings, progress, started
        self.generator = torch.Generator(features[0].targets.device).manual_seed(settings.seed)
        self.targets = features[0].targets
        self.step = 0
        self.rate = settings.feature_rate
        # Decoding and its dtypes round otherwise than features: a token that only just passed here may fail the proof.
        self.enough = (settings.certify_threshold + settings.train_threshold) / 2
        self.lowest = torch.zeros(len(self.targets), device=self.targets.device)
        """Per token, the lowest probability in the last full check, over all dtypes."""
        single_long = records == 1 and len(self.targets) > settings.long_tokens
        self.sliding = objectives.SlidingState.start(1, self.targets.device) if single_long else None
        self.rest = torch.full((len(self.targets),), -math.inf, device=self.targets.device)
        """Per token, what all others than the competing ones weigh together: log Σ exp of their logits, as of the last
        check. Without it the softmax over few is blind to a mass that is spread thin."""
        self.rivals = Rivals(adapted.base.model.get_output_embeddings(), self.targets)
        self.attach(rank)
        self.check(FIRST_RIVALS)

    def attach(self, rank: int, grown_from: int = 0) -> None:
        """Begin with (re)created matrices: A random in whitened coordinates where it is new."""
        self.rank = rank
        layers = self.adapted.lora_layers(self.name)
        self.endings = [Ending(self.adapted.model, features, layers) for features in self.features]
        self.ending = self.endings[0]
        self.ending.deviate(self.endings[1:], self.caution)
        sites = []
        for layer in layers:
            a, b = layer.lora_A[self.name].weight, layer.lora_B[self.name].weight
            moments = self.ending.moments(layer)
            if not bool(torch.isfinite(moments).all()):  # which has no factor
                raise TrainingDiverged(
                    f"The hidden states of {type(self.adapted.model).__name__} are not finite in "
                    f"{self.adapted.base.dtype}. Nothing was committed. Check it for NaN weights, or use float32.",
                    step=self.step,
                    learning_rate=self.rate,
                )
            factor = whitening_factor(moments)
            with torch.no_grad():
                a[grown_from:] = random_rows(rank - grown_from, factor, self.settings.seed + rank)
            sites.append(Site(a, b, factor, self.ending.scale(layer) / layer.scaling[self.name]))
        self.sites = sites
        self.restart()

    def restart(self) -> None:
        """A fresh optimiser on the matrices as they are; gradients of a loss that was not finite are dropped."""
        for site in self.sites:
            site.a.grad = site.b.grad = None
        self.optimizer = WhitenedAdam(self.sites, self.rate)
        self.best, self.decay = _Best(step=self.step), 1.0
        self.remember()

    def remember(self) -> None:
        self.last_good = {key: tensor.clone() for key, tensor in self.adapted.weights(self.name).items()}

    @property
    def open(self) -> int:
        """Tokens that were not certified when last seen."""
        return int((self.lowest < self.settings.certify_threshold).sum())

    def stubborn_records(self) -> tuple[int, ...]:
        owners = self.features[0].owners
        return tuple(owners[self.lowest < self.settings.certify_threshold].unique().tolist())

    def until_certified_or_stalled(self) -> bool:
        """True when every token is certified over the whole vocabulary in every dtype, most with something to spare;
        False when progress stopped before."""
        checked = self.step
        while self.step - self.best.step < IDLE_STEPS:
            open_tokens, open_loss, loss = self.train_step()
            if not math.isfinite(loss):
                self.recover()
                continue
            passed = False
            due = open_tokens == 0 and self.step - checked >= RECHECK_STEPS
            if due or self.step - checked >= CHECK_STEPS:
                checked = self.step
                self.remember()
                passed = self.suspects_pass() and self.check(NEW_RIVALS)
            self.report(0 if passed else open_tokens, loss)
            if passed:
                return True
            self.note_progress(open_tokens, open_loss)
        self.check(NEW_RIVALS, every=True)
        return self.open == 0

    def train_step(self) -> tuple[int, float, float]:
        """One step over all positions; how many tokens were open before it, their loss, and the mean over all tokens,
        which is NaN if nothing moved."""
        self.ending.shuffle_deviations(self.generator)
        total_weight, open_tokens, open_loss, loss = 0.0, 0, 0.0, 0.0
        with self.cast(self.adapter_dtypes[self.step % len(self.adapter_dtypes)]):
            for rows in self.ending.chunks(len(self.targets) if self.sliding else TRAIN_ROWS):
                losses, weights = self.weighted_losses(rows)
                (losses * weights).sum().backward()
                seen = losses.detach()
                is_open = ~(seen <= -math.log(self.enough))  # NaN is open
                total_weight += float(weights.sum())
                open_tokens += int(is_open.sum())
                open_loss += float((seen * is_open).sum())
                loss += float(seen.sum())
        share = open_tokens / len(self.targets)
        if math.isfinite(loss) and self.optimizer.step(
            min(1.0, max(LEAST_SHARE, share / 0.1)) * self.decay, 1 / max(total_weight, objectives.MIN_WEIGHT)
        ):
            self.step += 1
            return open_tokens, open_loss, loss / len(self.targets)
        return open_tokens, open_loss, math.nan

    @contextmanager
    def cast(self, dtype: torch.dtype) -> Iterator[None]:
        """Within this context the adapter is what it is when it is served in a dtype; gradients are of the cast one.

        Rows of A cancel the mean of the inputs by large entries: rounding these weighs more than their size says.
        """
        weights = [] if dtype == torch.float32 else [weight for site in self.sites for weight in (site.a, site.b)]
        before = [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            for weight in weights:
                weight.copy_(weight.to(dtype))
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, old in zip(weights, before, strict=True):
                    weight.copy_(old)

    def weighted_losses(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Cross-entropy (n,) over the competing tokens and the rest, and the objective's weights (n,)."""
        logits = torch.cat([self.ending.logits(rows, self.rivals.head), self.rest[rows, None]], 1)
        targets = self.rivals.targets[rows]
        losses = cross_entropy(logits, targets, reduction="none")
        mask = torch.ones_like(targets, dtype=torch.bool)[None]
        if self.settings.objective == "sft":
            return losses, objectives.sft(losses[None], mask)[0]
        if self.settings.objective == "memft-sw" and self.sliding is not None:
            correct = logits.detach().argmax(-1) == targets
            weights, self.sliding = objectives.memft_sw(
                losses[None], mask, correct[None], self.sliding, self.settings.train_threshold
            )
            return losses, weights[0]
        return losses, objectives.memft_ot(losses[None], mask, self.settings.train_threshold, idle="zero")[0]

    def check(self, rivals: int, *, every: bool = False) -> bool:
        """Probabilities over the whole vocabulary, dtype after dtype until one has too low a one; whether none has.

        Args:
            every: Look at all dtypes, to say of every token whether it is certified.
        """
        lowest = torch.ones_like(self.lowest)
        for ending in self.endings:
            for rows in ending.chunks(CHECK_ROWS):
                lowest[rows] = torch.minimum(lowest[rows], self.look(ending, rows, rivals))
            if not every and float(lowest.min()) < self.enough:
                break
        self.lowest = lowest
        log.debug("step %d: %d tokens open, lowest p %.3f", self.step, self.open, lowest.min())
        return float(lowest.min()) >= self.enough

    def suspects_pass(self) -> bool:
        """Look again at what the last check found too low: as long as some of it is, all the rest need no look."""
        rows = (self.lowest < self.enough).nonzero().flatten()
        if len(rows) > CHECK_ROWS:
            return True
        found = [self.look(ending, rows, NEW_RIVALS) for ending in self.endings]
        self.lowest[rows] = torch.stack(found).amin(0)
        return float(self.lowest.min()) >= self.enough

    @torch.no_grad()
    def look(self, ending: Ending, rows: slice | Tensor, rivals: int) -> Tensor:
        """Probabilities (n,) over the whole vocabulary at some positions; the likeliest tokens join the competing ones.

        What the others weigh is taken down as well.
        """
        with self.cast(self.adapter_dtypes[self.endings.index(ending)]):
            logits = ending.logits(rows, deviating=False)
        self.rivals.add(logits.topk(min(rivals, logits.shape[-1])).indices)
        if ending is self.ending:
            self.rest[rows] = self.rivals.rest(logits)
        losses = cross_entropy(logits, self.targets[rows], reduction="none")
        return torch.exp(-losses).nan_to_num(0.0)

    def note_progress(self, open_tokens: int, loss: float) -> None:
        """Progress is fewer open tokens or a loss of theirs 1 % below that of the last progress; without it the rate
        is halved."""
        if open_tokens < self.best.tokens or loss < 0.99 * self.best.loss:
            self.best = _Best(min(open_tokens, self.best.tokens), min(loss, self.best.loss), self.step)
        elif (self.step - self.best.step) % IDLE_DECAY == 0:
            self.decay = max(self.decay / 2, MIN_DECAY)

    def recover(self) -> None:
        """After NaN or Inf: the last good weights, half the rate, a fresh optimiser."""
        self.rate /= 2
        log.warning("loss is not finite at step %d; back to the last good state at rate %g", self.step, self.rate)
        if self.rate < self.settings.feature_rate / 64:
            raise TrainingDiverged(
                f"Training diverged at step {self.step}, also at rate {self.rate * 2:g}. Nothing was committed. Check "
                "the base model for NaN weights, or lower feature_rate.",
                step=self.step,
                learning_rate=self.rate * 2,
            )
        load_weights(self.adapted.weights(self.name), self.last_good)
        self.restart()

    def report(self, open_tokens: int, loss: float) -> None:
        if self.progress is None:
            return
        self.progress(
            WriteProgress(
                step=self.step,
                tokens_ordered=len(self.targets) - open_tokens,
                tokens_total=len(self.targets),
                min_prob=float(self.lowest.min()),
                loss=loss,
                rank=self.rank,
                elapsed_s=time.monotonic() - self.started,
            )
        )
