"""Training over features: an adapter behind the last attention, written without a pass through the network.

`loramem.models.features` holds what the adapted modules see at every answer position. Training is then an optimisation
over these N vectors alone: whitened coordinates (`loramem.training.whitening`), all positions in every step, and a
softmax over the few tokens that compete. That softmax is too sure of itself, so it decides nothing: what ends training
is a full check over the whole vocabulary, whose rivals join the few.

What will be served differs from what is trained by rounding: another dtype moves the features by one or two percent.
So features of every dtype to be served are collected, each step adds to some positions the deviation of another dtype,
and the adapter holds values that no cast changes.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn.functional import cross_entropy

from loramem.errors import TrainingDiverged
from loramem.models.adapters import AdaptedModel, count_parameters, load_weights, rank_choices
from loramem.models.ending import Ending, Head
from loramem.models.features import Features
from loramem.models.layers import LastLayer
from loramem.models.placement import Placement
from loramem.models.rounded_inputs import in_eight_bits, rounded
from loramem.training import objectives
from loramem.training.progress import ProgressCallback, Training, WriteProgress
from loramem.training.rivals import Rivals
from loramem.training.settings import WriterSettings
from loramem.training.trainer import autocast_dtype
from loramem.training.whitening import DAMPING, STRONG_DAMPING, Site, WhitenedAdam, random_rows, whitening_factor

log = logging.getLogger(__name__)

FIRST_RIVALS, NEW_RIVALS, MANY_RIVALS = 5, 3, 64
"""Likeliest tokens of a position that join the softmax over few: before training, whenever it is too low, and when as
many have been so for `SAME_MANY` steps: what the others weigh has no gradient, and of tokens that a base hardly ever
saw in training dozens are alike."""
SAME_MANY = 16
TRAIN_ROWS = 4096
LOOK_LOGITS = 2**22
"""Logits of the whole vocabulary that are computed together: what a processor's cache holds, so that only the product
takes long."""
SAMPLE = 512
"""Positions that are looked at while more are too low: they name the tokens that compete at the others as well."""
FEW = 0.1
"""Share of all tokens below which some are few."""
LOOK_STEPS, LOOK_STEPS_FEW = 16, 4
"""Steps between two looks over the whole vocabulary: while many tokens are open, and when few are."""
ROUNDING = 0.07
"""Rounded logits may move a probability of `enough` by so much."""
LEAST_SHARE = 0.05
"""With few tokens open the rate falls with their share, down to this part of it."""
SAME_SPARE = 40
"""Steps with as many open tokens after which what is certified need not have more to spare. The final norm bounds some
tokens of small bases between the two, which they come near ever more slowly."""
IDLE_DECAY, IDLE_STEPS = 40, 160
"""Steps without progress after which the rate is halved, and after which the rank grows."""
MIN_DECAY = 1 / 16
CREEPING = 0.75
"""The rank grows as well where of more than a few open tokens more than this share are left after `IDLE_STEPS` more: it
would go on for a thousand steps, and fail (docs/engine.md)."""


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
    outcomes: Sequence[Features] = (),
    begin_at: Mapping[str, Tensor] | None = None,
) -> Training:
    """As `loramem.training.trainer.train_adapter`, for a placement behind the last attention.

    Args:
        features: Of the same records in every dtype that is to be served, the model's own first.
        records: How many there are.
        adapter_dtypes: What the adapter is cast to where it is served: its entries are values of the coarsest of them.
        caution: Factor on the deviations between dtypes that training adds.
        outcomes: Features of several passes of one arithmetic, whose roundings come out otherwise in each.
        begin_at: Weights of an adapter of this rank and placement, to go on with; none begins anew.

    Raises:
        TrainingDiverged: NaN or Inf, in the features or again after several restarts at lower rates.
    """
    started = time.monotonic()
    adapted.create(name, rank, placement, settings.seed)
    if begin_at is not None:
        load_weights(adapted.weights(name), begin_at)
    run = FeatureRun(
        adapted,
        name,
        features,
        records,
        rank,
        settings,
        progress,
        started,
        adapter_dtypes,
        caution,
        outcomes,
        known=0 if begin_at is None else rank,
    )
    for next_rank in [*rank_choices(rank, settings.max_rank)[1:], None]:
        if run.until_certified_or_stalled(patient=next_rank is None) or next_rank is None:
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


@dataclass
class _Best:
    """The least that was open, and when."""

    tokens: float = math.inf
    loss: float = math.inf
    step: int = 0
    fewer: int = 0
    """When fewer tokens were open than ever before."""


class FeatureRun:
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
        outcomes: Sequence[Features] = (),
        known: int = 0,
    ) -> None:
        """
        Args:
            known: The rank up to which the attached matrices are trained already.
        """
        self.rounded_to = max(adapter_dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
        self.caution, self.outcomes = caution, outcomes
        self.adapted, self.name, self.features, self.records = adapted, name, features, records
        self.settings, self.progress, self.started = settings, progress, started
        self.generator = torch.Generator(features[0].targets.device).manual_seed(settings.seed)
        self.targets = features[0].targets
        self.everywhere = torch.arange(len(self.targets), device=self.targets.device)
        self.step = 0
        self.open_records: float = records  # before the last step, in the softmax over few
        self.rate = settings.feature_rate
        # Decoding and its dtypes round otherwise than features: a token that only just passed here may fail the proof.
        self.enough = (settings.certify_threshold + settings.train_threshold) / 2
        self.lowest = torch.zeros(len(self.targets), device=self.targets.device)
        """Per token, the lowest probability when it was last looked at, over all dtypes."""
        self.objective = objectives.BY_NAME[settings.objective]
        single_long = records == 1 and len(self.targets) > settings.long_tokens
        self.sliding = objectives.SlidingState.start(1, self.targets.device) if single_long else None
        head, products = adapted.base.model.get_output_embeddings(), autocast_dtype(self.targets.device)
        weight = head.get_parameter("weight").detach() if outcomes else None
        if weight is not None and not adapted.base.rounds_inputs:
            weight = rounded(weight)
        self.rivals = Rivals(head, self.targets, products, eight_bits=weight)
        self.look_rows = max(1, LOOK_LOGITS // self.rivals.vocabulary)
        self.attach(rank, grown_from=known)
        self.look_at(self.everywhere, self.endings[:1], FIRST_RIVALS)

    def attach(self, rank: int, grown_from: int = 0) -> None:
        """Begin with (re)created matrices: A random in whitened coordinates where it is new."""
        self.rank = rank
        layers = self.adapted.lora_layers(self.name)
        model, quantised = self.adapted.model, self.adapted.base.rounds_inputs
        exact = [Ending(model, each, layers) for each in self.features]
        with in_eight_bits(LastLayer.of(model).layer, weights=not quantised):
            outcomes = [Ending(model, each, layers, eight_bits=True) for each in self.outcomes]
        self.ending, self.endings = exact[0], [*exact, *outcomes]
        self.ending.deviate(exact[1:], self.caution, outcomes)
        self.sites = self.begin(layers, grown_from)
        self.restart()

    def begin(self, layers: Sequence[LoraLayer], grown_from: int) -> list[Site]:
        """What is trained; the rows of A that are new are random."""
        sites = []
        for layer in layers:
            a, b = layer.lora_A[self.name].weight, layer.lora_B[self.name].weight
            moments = self.finite(self.ending.moments(layer))
            # Roundings to eight bits move faint directions by as much as records differ there.
            faint = len(self.targets) > len(moments) and not self.outcomes
            factor = whitening_factor(moments, DAMPING if faint else STRONG_DAMPING)
            with torch.no_grad():
                a[grown_from:] = random_rows(self.rank - grown_from, factor, self.settings.seed + self.rank)
            sites.append(Site(a, b, factor, self.ending.scale(layer) / layer.scaling[self.name]))
        return sites

    def finite(self, moments: Tensor) -> Tensor:
        """Second moments as they are.

        Raises:
            TrainingDiverged: They hold NaN or Inf, and have no factor.
        """
        if not bool(torch.isfinite(moments).all()):
            raise TrainingDiverged(
                f"The hidden states of {type(self.adapted.model).__name__} are not finite in "
                f"{self.adapted.base.dtype}. Nothing was committed. Check it for NaN weights, or use float32.",
                step=self.step,
                learning_rate=self.rate,
            )
        return moments

    def restart(self) -> None:
        """A fresh optimiser on the matrices as they are; gradients of a loss that was not finite are dropped."""
        for site in self.sites:
            site.a.grad = site.b.grad = None
        self.optimizer = WhitenedAdam(self.sites, self.rate, self.rounded_to)
        self.best, self.decay = _Best(step=self.step, fewer=self.step), 1.0
        self.earlier = self.best
        """The best at the last multiple of `IDLE_STEPS`."""
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

    def until_certified_or_stalled(self, *, patient: bool = True) -> bool:
        """True when every token is certified over the whole vocabulary in every dtype, most with something to spare;
        False when progress stopped before.

        Args:
            patient: Even the slowest progress goes on: there is no more rank to grow to.
        """
        looked, few = self.step, FEW * len(self.targets)
        while self.step - self.best.step < IDLE_STEPS:
            open_tokens, open_loss, loss = self.train_step()
            if not math.isfinite(loss):
                self.recover()
                continue
            passed = False
            if self.step - looked >= (LOOK_STEPS_FEW if open_tokens <= few else LOOK_STEPS):
                looked = self.step
                self.remember()
                likely = self.likely()
                passed = not self.look_at_low(likely, open_tokens > few) and self.check(NEW_RIVALS, likely.argsort())
                if self.step - self.best.fewer >= SAME_SPARE and float(likely.min()) >= self.settings.certify_threshold:
                    passed = passed or self.certified()
            self.report(0 if passed else open_tokens, loss)
            if passed:
                return True
            self.note_progress(open_tokens, open_loss)
            if not patient and self.creeps(few):
                break
        return self.certified()

    def creeps(self, few: float) -> bool:
        """Whether hardly any of many open tokens were closed in the last `IDLE_STEPS`; those of one long answer stay
        open until the window comes to them."""
        if self.step < self.earlier.step + IDLE_STEPS or self.sliding:
            return False
        before, self.earlier = self.earlier.tokens, replace(self.best, step=self.step)
        return self.best.tokens > few and self.best.tokens > CREEPING * before

    def certified(self) -> bool:
        """Whether every token is, by a look at all of them."""
        self.check(NEW_RIVALS, every=True)
        return self.open == 0

    def train_step(self) -> tuple[int, float, float]:
        """One step over all positions; how many tokens were open before it, their loss, and the mean over all tokens,
        which is NaN if nothing moved."""
        self.ending.shuffle_deviations(self.generator)
        sums = torch.zeros(4, device=self.targets.device)
        open_of = torch.zeros(self.records, device=self.targets.device)
        for rows in self.ending.chunks(len(self.targets) if self.sliding else TRAIN_ROWS):
            losses, weights = self.weighted_losses(rows)
            (losses * weights).sum().backward()
            seen = losses.detach()
            is_open = ~(seen <= -math.log(self.enough))  # NaN is open
            sums += torch.stack([weights.sum(), is_open.sum(), seen[is_open].sum(), seen.sum()])
            open_of.index_add_(0, self.features[0].owners[rows], is_open.to(open_of.dtype))
        told = torch.cat([sums, (open_of > 0).sum()[None]])
        total_weight, open_tokens, open_loss, loss, self.open_records = told.tolist()  # one wait for the device
        weight = max(total_weight, objectives.MIN_WEIGHT)
        self.hold()
        if math.isfinite(loss) and self.optimizer.step(self.rate_factor(open_tokens / len(self.targets)), 1 / weight):
            self.step += 1
            return int(open_tokens), open_loss, loss / len(self.targets)
        return int(open_tokens), open_loss, math.nan

    def hold(self) -> None:
        """Take gradients off what is not to move; here all may."""

    def rate_factor(self, open_share: float) -> float:
        """On the rate of a step, by the share of tokens that are open."""
        return min(1.0, max(LEAST_SHARE, open_share / FEW)) * self.decay

    def weighted_losses(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Cross-entropy (n,) over the competing tokens and the rest, and the objective's weights (n,)."""
        head = self.rivals.few_of(self.ending.has_outcome[rows])
        logits = self.rivals.with_rest(self.ending.logits(rows, head), rows)
        targets = self.rivals.targets[rows]
        losses = cross_entropy(logits, targets, reduction="none")
        mask = torch.ones_like(targets, dtype=torch.bool)[None]
        objective, threshold = self.objective, self.settings.train_threshold
        if self.sliding is None or objective.sliding is None:
            return losses, objective.weights(losses[None], mask, threshold, "zero")[0]
        correct = logits.detach().argmax(-1) == targets
        weights, self.sliding = objective.sliding(losses[None], mask, correct[None], self.sliding, threshold)
        return losses, weights[0]

    def look_at_low(self, likely: Tensor, many: bool = False) -> bool:
        """Look over the whole vocabulary at what is too low in the softmax over few, at a sample if that is much;
        whether it is.

        Args:
            likely: From `likely`.
            many: Most tokens are open: one dtype names what competes.
        """
        low = (likely < self.enough).nonzero().flatten()
        if not len(low):
            return False
        if len(low) > SAMPLE:
            low = low[torch.randperm(len(low), generator=self.generator, device=low.device)[:SAMPLE]]
        rivals = MANY_RIVALS if self.step - self.best.fewer >= SAME_MANY else NEW_RIVALS
        self.look_at(low, self.endings[:1] if many else self.endings, rivals)
        return float(self.lowest[low].min()) < self.enough

    @torch.no_grad()
    def likely(self) -> Tensor:
        """Probabilities (N,) in the softmax over few and the rest as last seen, the lowest of all dtypes: hardly ever
        below those over the whole vocabulary, and much cheaper."""
        lowest = torch.ones_like(self.lowest)
        for ending in self.endings:
            head = self.rivals.head_of(ending).few
            for rows in self.everywhere.split(TRAIN_ROWS):
                logits = self.rivals.with_rest(ending.logits(rows, head, deviating=False), rows)
                losses = cross_entropy(logits, self.rivals.targets[rows], reduction="none")
                lowest[rows] = torch.minimum(lowest[rows], torch.exp(-losses).nan_to_num(0.0))
        return lowest

    def check(self, rivals: int, order: Tensor | None = None, *, every: bool = False) -> bool:
        """Look at all positions over the whole vocabulary, in every dtype, until some have too low a probability;
        whether none has.

        Args:
            order: The positions, those that are likely to fail first.
            every: Look at all of them whatever is found, to say of every token whether it is certified.
        """
        for rows in (self.everywhere if order is None else order).split(self.look_rows):
            self.look_at(rows, self.endings, rivals, every=every)
            if not every and float(self.lowest[rows].min()) < self.enough:
                return False
        log.debug("step %d: %d tokens open, lowest p %.3f", self.step, self.open, self.lowest.min())
        return float(self.lowest.min()) >= self.enough

    def look_at(self, rows: Tensor, endings: Sequence[Ending], rivals: int, *, every: bool = False) -> None:
        """Take down the lowest probabilities over the whole vocabulary at some positions."""
        for part in rows.split(self.look_rows):
            self.lowest[part] = torch.stack([self.look(each, part, rivals, every=every) for each in endings]).amin(0)

    def look(self, ending: Ending, rows: Tensor, rivals: int, *, every: bool = False) -> Tensor:
        """Probabilities (n,) over the whole vocabulary at some positions.

        Rounded products show which are near the limit; these are computed again.

        Args:
            every: Those below it as well, whichever limit that is.
        """
        head = self.rivals.head_of(ending)
        if not head.rounds:
            return self.probabilities(ending, rows, rivals, head.all)
        probs = self.probabilities(ending, rows, rivals, head.all_rounded)
        near = (probs < self.enough + ROUNDING) & (every | (probs > self.enough - ROUNDING))
        if bool(near.any()):
            probs[near] = self.probabilities(ending, rows[near], rivals, head.all)
        return probs

    @torch.no_grad()
    def probabilities(self, ending: Ending, rows: Tensor, rivals: int, head: Head) -> Tensor:
        """Where one is too low, the likeliest tokens join the competing ones; what the others weigh is taken down."""
        logits, targets = ending.logits(rows, head, deviating=False), self.targets[rows]
        losses = cross_entropy(logits, targets, reduction="none")  # several times as fast as a logsumexp on a processor
        probs = torch.exp(-losses).nan_to_num(0.0)
        self.rivals.add(logits[probs < self.enough].topk(min(rivals, logits.shape[-1])).indices)
        if ending is self.ending:
            self.rivals.look_at_rest(logits, losses + logits.gather(1, targets[:, None])[:, 0], rows)
        return probs

    def note_progress(self, open_tokens: int, loss: float) -> None:
        """Progress is fewer open tokens or a loss of theirs 1 % below that of the last progress; without it the rate
        is halved."""
        if (fewer := open_tokens < self.best.tokens) or loss < 0.99 * self.best.loss:
            since = self.step if fewer else self.best.fewer
            self.best = _Best(min(open_tokens, self.best.tokens), min(loss, self.best.loss), self.step, since)
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
                records_ordered=self.records - (int(self.open_records) if open_tokens else 0),
                records=self.records,
            )
        )
