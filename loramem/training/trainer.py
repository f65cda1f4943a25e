"""The training loop: records, a rank and an objective in; an adapter whose every answer token is certified out.

It stops when every answer token and end token of every record has p >= ``certify_threshold`` under teacher forcing,
never at an epoch count. When progress stops, the rank grows in place; at the highest rank it gives up and says which
records are left.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loramem.errors import TrainingDiverged
from loramem.models.adapters import AdaptedModel, count_parameters, load_weights, rank_choices
from loramem.models.batches import group_by_length, per_position, token_losses
from loramem.models.layers import features
from loramem.models.placement import Placement
from loramem.models.trunk import Trunk
from loramem.records.prompts import EncodedRecord
from loramem.training import objectives
from loramem.training.initialization import aligned_rows, collect_moments
from loramem.training.optimizers import make_optimizer, set_rate
from loramem.training.progress import ProgressCallback, Training, WriteProgress
from loramem.training.settings import WriterSettings

log = logging.getLogger(__name__)

CHECK_RECORDS, CHECK_TOKENS = 64, 32_768
# Of a training batch, tokens with padding; a hundred records took as many visits in batches of 5 as of 50.
BATCH_RECORDS, BATCH_TOKENS = 25, 8192
MAX_GRAD_NORM = 1.0
# Without progress for as many passes, and at least as many steps, the rate is halved; down to MIN_DECAY of its start.
DECAY_PASSES, DECAY_STEPS, MIN_DECAY = 3, 12, 1 / 64
# With fewer than half of the tokens open, progress in this is a loss down by a tenth: less is hovering, which a lower
# rate ends (docs/lab/engine.md).
SETTLING, SETTLING_LOSS = 0.5, 0.9
# With fewer than a tenth of the tokens open the rate falls with their share, but not below this part of it: at a tenth
# the last tokens of long records hardly moved.
LEAST_SHARE = 0.5
# Without progress for as many, and a larger share of the tokens than HOPELESS not ordered, training begins again at a
# third of the rate. Measured with rates that were too high by a lot.
WRECKED_PASSES, WRECKED_STEPS, HOPELESS = 8, 40, 0.1


@dataclass(frozen=True)
class NetworkSchedule:
    """Rate and patience of training through the network. Defaults are a write's; calibration and suites take others."""

    learning_rate: float = 0.06
    """Relative: the share of a module's output that one step can change (`loramem.training.optimizers`); the same for
    every base model and rank."""
    patience_passes: int = 40
    """Steps without progress before the rank grows, in passes over all records."""
    restarts: int = 2
    """How often training may begin again at a third of the rate, where progress stops with most tokens open."""


def train_adapter(
    adapted: AdaptedModel,
    name: str,
    records: Sequence[EncodedRecord],
    rank: int,
    placement: Placement,
    settings: WriterSettings,
    progress: ProgressCallback | None = None,
    trunk: Trunk | None = None,
    schedule: NetworkSchedule = NetworkSchedule(),
) -> Training:
    """Train a new adapter ``name`` until every token of every record is certified.

    The adapter is left attached and active as training left it, certified or not.

    Args:
        trunk: Of these records at the lowest layer of ``placement``, to share between runs; made here if None.

    Raises:
        TrainingDiverged: NaN or Inf, again after several restarts at lower learning rates.
    """
    started = time.monotonic()
    adapted.create(name, rank, placement, settings.seed)
    trunk = trunk or Trunk(adapted.model, records, min(placement.layers))
    run = _Run(adapted, name, trunk, rank, settings, schedule, progress, started)
    for next_rank in [*rank_choices(rank, settings.max_rank)[1:], None]:
        done = run.until_certified_or_stalled()
        while not done and run.too_fast:
            adapted.create(name, run.rank, placement, settings.seed)
            run.start_slower()
            done = run.until_certified_or_stalled()
        if done or next_rank is None:
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
        elapsed_s=time.monotonic() - started,
    )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What training's matrix products are cast to: bfloat16 where the processor multiplies it natively.

    None leaves them in the model's dtype.
    """
    native = device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if native else None


class _Run:
    """State of one training: what was seen of every record, the optimiser, the last good weights."""

    def __init__(
        self,
        adapted: AdaptedModel,
        name: str,
        trunk: Trunk,
        rank: int,
        settings: WriterSettings,
        schedule: NetworkSchedule,
        progress: ProgressCallback | None,
        started: float,
    ) -> None:
        self.adapted, self.name, self.trunk, self.settings, self.schedule = adapted, name, trunk, settings, schedule
        self.records, self.progress, self.started = trunk.records, progress, started
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.steps_per_pass = math.ceil(len(self.records) / BATCH_RECORDS)
        self.step = self.visits = self.restarts = 0
        self.tokens = torch.tensor([len(record.answer_ids) for record in self.records])
        # As last seen, per record: lowest probability, tokens below the certified one, Σ of all losses and of theirs.
        self.lowest = torch.zeros(len(self.records))
        self.open_tokens = self.tokens.clone()
        self.losses = torch.full((len(self.records),), math.inf)
        self.open_losses = self.losses.clone()
        self.objective = objectives.BY_NAME[settings.objective]
        single_long = len(self.records) == 1 and self.records[0].length > settings.long_tokens
        self.sliding = objectives.SlidingState.start(1, adapted.base.device) if single_long else None
        self.learning_rate = schedule.learning_rate
        self.autocast = autocast_dtype(adapted.base.device)  # weights, losses and checks stay float32
        self.rank = rank
        self.align()

    def restart(self, rank: int) -> None:
        """A new optimiser for (re)created parameters; what was seen is kept."""
        self.rank = rank
        self.parameters = self.adapted.trainable()
        self.optimizer = self.new_optimizer()
        self.best_unordered, self.best_loss, self.best_step = math.inf, math.inf, self.step
        self.decay, self.decay_step, self.decay_loss = 1.0, self.step, math.inf
        self.remember()

    def align(self) -> None:
        """Begin training: one frozen pass over all records says how large the modules' outputs are, which the rates
        depend on, and where A starts; no step is taken."""
        layers = self.adapted.lora_layers(self.name)
        with collect_moments(layers, [features(layer.get_base_layer()) for layer in layers]) as moments:
            for indices in self.batches(range(len(self.records))):
                losses, *_ = self.forward(indices)
                losses.sum().backward()
                self.see(indices, losses.detach())
        for parameter in self.adapted.trainable():
            parameter.grad = None
        finite = all(found.finite for found in moments)
        if not finite:
            log.warning("the base's gradient is not finite; training starts from random directions")
        else:
            with torch.no_grad():
                for layer, found in zip(layers, moments, strict=True):
                    layer.lora_A[self.name].weight.copy_(aligned_rows(found, self.rank, self.generator))
        self.output_scales = [found.output_scale if finite else 1.0 for found in moments]
        self.restart(self.rank)

    def new_optimizer(self) -> torch.optim.Optimizer:
        layers = self.adapted.lora_layers(self.name)
        pairs = [(layer.lora_A[self.name].weight, layer.lora_B[self.name].weight) for layer in layers]
        return make_optimizer(pairs, self.output_scales)

    @property
    def too_fast(self) -> bool:
        """Whether training stopped so far from done that the rate is to blame, and there is a lower one to try."""
        hopeless = self.unordered > HOPELESS * int(self.tokens.sum())
        return hopeless and self.restarts < self.schedule.restarts

    def start_slower(self) -> None:
        """Begin again, from the base's function, at a third of the rate: weights that a high one wrecked stay so."""
        self.learning_rate /= 3
        self.restarts += 1
        log.info("no progress with %d tokens left; starting again at rate %g", self.unordered, self.learning_rate)
        self.lowest.zero_()
        self.align()

    def remember(self) -> None:
        self.last_good = {key: tensor.clone() for key, tensor in self.adapted.weights(self.name).items()}

    @property
    def unordered(self) -> int:
        return int(self.open_tokens.sum())

    @property
    def idle_passes(self) -> float:
        return (self.step - self.best_step) / self.steps_per_pass

    @property
    def wrecked(self) -> bool:
        """A few idle passes with most tokens still open: not a matter of the last tokens settling."""
        return self.step - self.best_step >= max(WRECKED_PASSES * self.steps_per_pass, WRECKED_STEPS)

    def stubborn_records(self) -> list[int]:
        return self.open_tokens.nonzero().flatten().tolist()

    def until_certified_or_stalled(self) -> bool:
        """Train passes over the active records; True when everything is certified, False when progress stopped."""
        visits_at_check = self.visits
        while self.idle_passes < self.schedule.patience_passes and not (self.wrecked and self.too_fast):
            active = self.active()
            done = sorted(set(range(len(self.records))).difference(active))
            # A look is a third of a visit: looking at those that left once per as many visits costs little.
            if done and (not active or self.visits - visits_at_check >= len(done)):
                self.look(done)
                active, visits_at_check = self.active(), self.visits
            if active and not self.train_pass(active):
                self.recover()
                continue
            if self.unordered == 0 and self.check():
                return True
            self.note_progress()
            self.remember()
        self.check()
        return False

    def active(self) -> list[int]:
        """Records whose gradient is worth a forward pass: those with a token left, or all on the way to convergence.

        Objectives give the others weight 0, but only leaving them out saves their forward pass.
        """
        everything = range(len(self.records))
        if self.objective.to_convergence or self.sliding is not None:
            return list(everything)
        return [index for index in everything if not self.lowest[index] >= self.settings.train_threshold]

    def train_pass(self, active: Sequence[int]) -> bool:
        """One pass over the active records; False at the first NaN or Inf."""
        shuffled = [active[i] for i in torch.randperm(len(active), generator=self.generator).tolist()]
        return all(self.train_step(batch) for batch in self.batches(shuffled))

    def batches(self, shuffled: Sequence[int]) -> list[list[int]]:
        """Batches of random composition: a pool of a few batches is sorted by length, then cut and shuffled."""
        pool = 8 * BATCH_RECORDS
        cut = [
            batch
            for start in range(0, len(shuffled), pool)
            for batch in group_by_length(self.records, shuffled[start : start + pool], BATCH_RECORDS, BATCH_TOKENS)
        ]
        return [cut[i] for i in torch.randperm(len(cut), generator=self.generator).tolist()]

    def forward(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Losses (B, K) of a batch with what is supervised and what is right, both (B, K) bool."""
        batch = self.trunk.batch(indices)
        with torch.autocast(batch.targets.device.type, self.autocast, enabled=self.autocast is not None):
            logits = self.trunk.logits(indices, batch)
        losses = token_losses(logits, batch)
        correct = per_position(logits.detach().argmax(-1) == batch.targets[batch.supervised], batch)
        return losses, batch.supervised, correct

    def train_step(self, indices: Sequence[int]) -> bool:
        losses, supervised, correct = self.forward(indices)
        weights = self.weights(losses, supervised, correct)
        self.optimizer.zero_grad()
        objectives.weighted_mean(losses, weights).backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        if not bool(torch.isfinite(norm) & torch.isfinite(losses.detach()).all()):
            return False
        set_rate(self.optimizer, self.learning_rate * self.rate_factor())
        self.optimizer.step()
        self.see(indices, losses.detach())
        self.step += 1
        self.visits += len(indices)
        self.report(float(losses.detach().sum() / supervised.sum()))
        return True

    def weights(self, losses: Tensor, supervised: Tensor, correct: Tensor) -> Tensor:
        objective, threshold = self.objective, self.settings.train_threshold
        if self.sliding is None or objective.sliding is None:
            return objective.weights(losses, supervised, threshold, "sft")
        weights, self.sliding = objective.sliding(losses, supervised, correct, self.sliding, threshold)
        return weights

    def rate_factor(self) -> float:
        """Learning rate as a share of its start, tied to progress: the last tokens settle only when it falls.

        It falls with the share of tokens that are not ordered yet, and by half, for good, whenever too little improved
        in a few passes: a rate that settles on one base model hovers on another.
        """
        share = self.unordered / int(self.tokens.sum())
        return min(1.0, max(LEAST_SHARE, share / 0.1)) * self.decay

    def see(self, indices: Sequence[int], losses: Tensor) -> None:
        """Keep what a forward pass said of its records (B, K); a training pass saw the weights before its step."""
        rows = torch.tensor(indices)
        highest = losses.amax(1).cpu()
        self.lowest[rows] = torch.exp(-highest)
        # Columns without a target have loss 0; NaN is not ordered.
        stubborn = ~(losses <= -math.log(self.settings.certify_threshold))
        self.open_tokens[rows] = stubborn.sum(1).cpu()
        self.losses[rows] = losses.sum(1).cpu()
        self.open_losses[rows] = (losses * stubborn).sum(1).cpu()

    @torch.no_grad()
    def look(self, indices: Sequence[int]) -> None:
        """Teacher-forced losses of records with the weights as they are now, in the model's own dtype."""
        for batch_indices in group_by_length(self.records, indices, CHECK_RECORDS, CHECK_TOKENS):
            batch = self.trunk.batch(batch_indices)
            self.see(batch_indices, token_losses(self.trunk.logits(batch_indices, batch), batch))

    def check(self) -> bool:
        """Look at all records; True if every token is certified."""
        self.look(range(len(self.records)))
        return self.unordered == 0

    def note_progress(self) -> None:
        """Progress is fewer stubborn tokens, or a loss 1 % below that of the last progress.

        The loss is that of the stubborn tokens, since a few of them rise slowly while the mean has long settled; for
        an objective that is trained to convergence, that of all.

        Without progress the rate is halved; while the last half of the tokens settles, also with too little of it.
        """
        unordered = self.unordered
        to_convergence = self.objective.to_convergence
        loss = float((self.losses if to_convergence else self.open_losses).sum())
        progress = unordered < self.best_unordered or loss < 0.99 * self.best_loss
        if progress:
            self.best_step, self.best_loss = self.step, loss
        self.best_unordered = min(unordered, self.best_unordered)
        if not to_convergence and unordered < SETTLING * int(self.tokens.sum()):
            progress = loss < SETTLING_LOSS * self.decay_loss
        if progress:
            self.decay_step, self.decay_loss = self.step, loss
        elif self.step - self.decay_step >= max(DECAY_PASSES * self.steps_per_pass, DECAY_STEPS):
            self.decay = max(self.decay / 2, MIN_DECAY)
            self.decay_step, self.decay_loss = self.step, loss

    def recover(self) -> None:
        """After NaN or Inf: the last good weights, half the learning rate, a fresh optimiser."""
        self.learning_rate /= 2
        log.warning(
            "loss is not finite at step %d; back to the last good state at rate %g", self.step, self.learning_rate
        )
        if self.learning_rate < self.schedule.learning_rate / 64:
            raise TrainingDiverged(
                f"Training diverged at step {self.step}, also at learning rate {self.learning_rate * 2:g}. "
                "Nothing was committed. Check the base model for NaN weights.",
                step=self.step,
                learning_rate=self.learning_rate * 2,
            )
        load_weights(self.adapted.weights(self.name), self.last_good)
        self.optimizer = self.new_optimizer()

    def report(self, loss: float) -> None:
        if self.progress is None:
            return
        total = int(self.tokens.sum())
        self.progress(
            WriteProgress(
                step=self.step,
                tokens_ordered=total - self.unordered,
                tokens_total=total,
                min_prob=float(self.lowest.min()),
                loss=loss,
                rank=self.rank,
                elapsed_s=time.monotonic() - self.started,
                records_ordered=len(self.records) - int((self.open_tokens > 0).sum()),
                records=len(self.records),
            )
        )
