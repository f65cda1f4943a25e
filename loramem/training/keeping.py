"""Training that leaves the base as it is elsewhere: the records take neurons of the last MLP that it hardly uses.

An adapter of rank r on all projections of the last MLP replaces r neurons (`loramem.models.neurons`). Their gates are
set, not trained (`loramem.training.gates`): some open where the answers to one or a few records begin, and are shut
for all other keys; the rest open within answers; all are shut at neutral positions (`loramem.training.neutral`). What
the neurons give where they are open is trained as ever. Nothing that training does can be seen where they are shut, so
no step looks at a neutral position.

What an adapter leaves of the base is measured on the adapter as saved (`loramem.training.kept`).
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from loramem.models.adapters import AdaptedModel, count_parameters, rank_choices
from loramem.models.ending import Ending
from loramem.models.features import Features
from loramem.models.neurons import LastMlp
from loramem.models.placement import Placement
from loramem.training.feature_writer import FeatureRun
from loramem.training.gates import Moments, between, parts, through
from loramem.training.neutral import QUESTIONS, TEXT, UNKNOWN, Neutral
from loramem.training.progress import ProgressCallback, Training
from loramem.training.settings import WriterSettings
from loramem.training.whitening import Site, random_rows, whitening_factor

log = logging.getLogger(__name__)

SHARES = {
    (TEXT, False): 0.1,
    (QUESTIONS, False): 0.15,
    (QUESTIONS, True): 0.1,
    (UNKNOWN, False): 0.05,
    (UNKNOWN, True): 0.6,
}
"""Of what gates of first positions are set against, by kind and whether an answer begins there: nothing is as near to
a key as another key."""
ELSEWHERE = {(TEXT, False): 0.3, (QUESTIONS, False): 0.3, (QUESTIONS, True): 0.3, (UNKNOWN, False): 0.1}
"""The same of what no key of the records' form is asked at: there their value is nothing as well. (A value of its own
for each key, as its gate, is large where the gate leaks: 34 at a position of text, in place of 7.)"""
ANYWHERE = {(TEXT, False): 0.3, (QUESTIONS, False): 0.3, (QUESTIONS, True): 0.15, (UNKNOWN, False): 0.1,
            (UNKNOWN, True): 0.15}  # fmt: skip
"""And of what gates within answers are set against."""
USED = {(TEXT, False): 0.3, (QUESTIONS, False): 0.5, (QUESTIONS, True): 0.1, (UNKNOWN, True): 0.1}
"""Of what the neurons that go are of least use to: most of what a base says are answers to questions."""
FIRST_OPEN, FIRST_SHUT = 6.0, 54.0
"""Gates of first positions there and, in the mean, at neutral ones. Steep: a key with a letter exchanged is nine tenths
of the way from any other key to the key itself."""
WITHIN_OPEN, WITHIN_SHUT = 6.0, 30.0
"""Gates within answers there, at least, and at neutral positions, at most."""
PASSED, LEAKS = -2.0, 2e-3
"""Above what a gate lets something through, and the share of neutral positions at which one may."""
REFUSING, IN_REFUSALS = 2, 6
"""Neurons that open wherever a key of the records' form is asked for, and within refusals."""
FORM_SHUT, ASKED = 14.0, 10.0
"""How far the first of these are shut elsewhere, and the weight of where they are to be open beside 1 of elsewhere."""
EACH = 3
"""Neurons of a part of what is within answers, at least: digits take a rank of three (docs/law.md)."""
WITHIN, OF_NEURONS = 24, 1 / 11
"""Neurons that open within answers, as long as three eighths of all are as many, and of all neurons those that go at
most, as what goes is missed. Measured: docs/keeping.md."""
READ = 16_384
"""Neutral positions of a pass."""
SAMPLED, SLOPES, STEP = 250, 4, 0.05
"""Per kind, positions that the Fisher information is the mean over, and of how many the slope of what enters the head
is taken, by steps of this share of what the MLP gives."""


class Shut:
    """What enters the last MLP at neutral positions, where gates are to be shut.

    Built while the model is the plain base.
    """

    def __init__(self, adapted: AdaptedModel, neutral: Neutral) -> None:
        self.mlp, self.asks = LastMlp.of(adapted.model), torch.tensor(neutral.asks)
        self.roles = self.mlp.roles()
        self._inputs = dict[tuple[str, bool], Tensor]()
        used, metric = torch.zeros(self.mlp.width), information(adapted, neutral, self.mlp)
        for kind, part in neutral.kinds.items():
            begins = torch.zeros_like(part.first) if kind == TEXT else part.first  # in text no answer begins
            for first in (False, True):
                rows, place = (begins == first).nonzero().flatten(), (kind, first)
                self._inputs[place] = torch.zeros(len(rows), len(metric), dtype=torch.bfloat16, device=metric.device)
                for some in torch.arange(len(rows)).split(READ) if len(rows) else ():
                    hidden, _ = inputs_of(adapted, _at(part.features, rows[some]), self.mlp)
                    used += self.mlp.use(hidden, metric).cpu() * USED.get(place, 0.0) / len(rows)
                    self._inputs[place][some] = hidden.to(torch.bfloat16)
        self.least_used = used.argsort()
        """(width,) neurons, those first whose loss would change the base's predictions least at neutral positions."""

    def moments(self, shares: dict[tuple[str, bool], float], *more: tuple[Tensor, float]) -> Moments:
        """Of neutral positions by their shares, and of more."""
        return Moments.of([(self._inputs[kind], share) for kind, share in shares.items()] + list(more))

    @property
    def unknown(self) -> Tensor:
        """Where the answer to an unknown key begins, (n, d)."""
        return self._inputs[UNKNOWN, True].float()

    @property
    def everywhere(self) -> Tensor:
        """All neutral positions, (n, d)."""
        return torch.cat(list(self._inputs.values())).float()

    def weights(self, shares: dict[tuple[str, bool], float]) -> Tensor:
        """Of each of `everywhere`, by the share of its kind; their sum is 1."""
        parts = [torch.full((len(rows),), shares.get(kind, 0.0) / max(1, len(rows))) for kind, rows in
                 self._inputs.items()]  # fmt: skip
        weights = torch.cat(parts).to(self.everywhere.device)
        return weights / weights.sum()


@torch.no_grad()
def information(adapted: AdaptedModel, neutral: Neutral, mlp: LastMlp) -> Tensor:
    """Fisher information (out, out) of the base's predictions about what its last MLP gives, the mean over some neutral
    positions: KL(base ‖ changed) is about half of dᵀFd for a small change d there."""
    head = adapted.model.get_output_embeddings()
    matrix = dict(head.named_parameters())["weight"].detach().float()
    whole = torch.zeros(matrix.shape[1], matrix.shape[1], device=matrix.device)
    slopes, count = list[Tensor](), 0
    for part in neutral.kinds.values():
        rows = torch.linspace(0, len(part) - 1, min(len(part), SAMPLED)).long()
        features = _at(part.features, rows).to(adapted.model.dtype)
        ending = Ending(adapted.model, features)
        _, given = ending.block_values(mlp.block)
        hidden = ending.hidden(slice(None), {mlp.block: given}).float()
        probs = ending.logits(slice(None)).softmax(1)
        means = probs @ matrix
        whole += (matrix.T * probs.sum(0)) @ matrix - means.T @ means
        count += len(rows)
        for row in range(0, len(rows), max(1, len(rows) // SLOPES)):
            step = float(given[row].float().norm()) * STEP
            changed = given[row] + step * torch.eye(given.shape[1], device=given.device, dtype=given.dtype)
            one = torch.full((len(changed),), row, device=given.device)
            moved = ending.hidden(one, {mlp.block: changed}).float() - hidden[row]
            slopes.append(moved / step)
    slope = torch.stack(slopes).mean(0)
    return slope @ (whole / count) @ slope.T


def inputs_of(adapted: AdaptedModel, features: Features, mlp: LastMlp) -> tuple[Tensor, Tensor]:
    """What enters the last MLP and what it gives at all positions, (N, d) each."""
    return Ending(adapted.model, features.to(adapted.model.dtype)).block_values(mlp.block)


def first_rank(adapted: AdaptedModel, records: int, refuses: bool = False) -> int:
    """Of an adapter for so many records, where none is asked for: they take no more neurons than they need, and
    questions that ask for one key share its neuron.

    Args:
        refuses: Unknown keys are refused as well.

    Raises:
        UnsupportedBaseModel: See `LastMlp.of`.
    """
    with adapted.disabled():
        mlp = LastMlp.of(adapted.model)
    needed = records + min(WITHIN, records + 4)
    more = REFUSING + IN_REFUSALS if refuses else 0
    return mlp.ranks_per_neuron * (more + min(needed, max(1, int(OF_NEURONS * mlp.width))))


def alike(targets: Tensor, asks: Tensor, count: int) -> list[Tensor]:
    """Indices of records in so many groups: those that ask for the same key (N,) together where that can be, and with
    others that begin with the same token (N,)."""
    order = torch.argsort(asks, stable=True)
    order = order[torch.argsort(targets[order], stable=True)]
    groups = list(order.split(torch.unique_consecutive(targets[order], return_counts=True)[1].tolist()))
    if len(groups) > count:
        return list(order.tensor_split(count))

    def keys(group: Tensor) -> int:
        return len(asks[group].unique())

    while len(groups) < min(count, len(targets)):
        largest = max(range(len(groups)), key=lambda number: (keys(groups[number]), len(groups[number])))
        group = groups[largest]
        starts = (asks[group].diff().nonzero().flatten() + 1).tolist() or [len(group) // 2]
        groups[largest : largest + 1] = group.tensor_split([starts[len(starts) // 2]])
    return groups


def _at(features: Features, rows: Tensor) -> Features:
    """The features of some positions."""
    return replace(features, **{name: values[rows] for name, values in vars(features).items()})


class KeepingRun(FeatureRun):
    """Training on all projections of the last MLP, of which an adapter replaces some neurons and no others."""

    def __init__(self, shut: Shut, *args: Any) -> None:
        self.shut = shut
        super().__init__(*args)

    spared: Tensor
    """(N,) where a refusal begins at which no gate opens: no training reaches it, and none waits for it."""

    def begin(self, layers: Sequence[LoraLayer], grown_from: int) -> list[Site]:
        """B of the projections into the neurons and A of the one out of them pick the neurons; gates are set; what is
        within answers is trained, and what comes out everywhere. With more neurons all begin anew."""
        mlp = self.shut.mlp
        self.neurons = self.shut.least_used[: self.rank // mlp.ranks_per_neuron].to(self.targets.device)
        modules = {mlp.block.get_submodule(path): path for path in mlp.paths}
        self.layers = sorted(layers, key=lambda layer: mlp.paths.index(modules[layer]))
        *base_in, base_out = mlp.weights(self.neurons)
        factor = whitening_factor(self.finite(self.ending.moments(self.layers[0])))
        wanted, frozen = self._rows(base_in, factor)
        sites = list[Site]()
        self.frozen = list[tuple[Tensor, Tensor]]()
        with torch.no_grad():
            for index, (layer, matrix) in enumerate(zip(self.layers[:-1], base_in, strict=True)):
                a, b = layer.lora_A[self.name].weight, layer.lora_B[self.name].weight
                rows = mlp.rows(index, self.neurons).flatten()
                a.zero_()
                a[: len(rows)] = (wanted[index] - matrix) / layer.scaling[self.name]
                b.zero_()
                b[rows, torch.arange(len(rows))] = 1.0
                sites.append(Site(a, b, factor, 1.0, step_a=1 / layer.scaling[self.name], moves_b=False))
                self.frozen.append((a, frozen[index]))
            out = self.layers[-1]
            a, b = out.lora_A[self.name].weight, out.lora_B[self.name].weight
            a.zero_()
            a[torch.arange(len(self.neurons)), self.neurons] = 1.0
            b.zero_()
            b[:, : len(self.neurons)] = -base_out / out.scaling[self.name]
        identity = torch.eye(a.shape[1], device=a.device)
        scale = self.ending.scale(out) / out.scaling[self.name]
        return [*sites, Site(a, b, identity, scale, moves_a=False)]

    def _rows(self, base_in: Sequence[Tensor], factor: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """What the modules that lead in are to have for the neurons, and which of these rows are not trained."""
        with self.adapted.disabled():
            inputs, _ = inputs_of(self.adapted, self.features[0], self.shut.mlp)
        owners = self.features[0].owners
        begins = torch.ones_like(owners, dtype=torch.bool)
        begins[1:] = owners[1:] != owners[:-1]
        self.spared = torch.zeros_like(begins)
        known = len(self.shut.asks)
        mine = begins & (owners < known)
        first, within = inputs[mine].float(), inputs[~begins].float()
        many, everywhere = len(self.neurons), self.shut.everywhere
        refusing, inner = (min(REFUSING, many // 4), IN_REFUSALS) if known < self.records else (0, 0)
        count = max(1, min(len(first), many - min(WITHIN, 3 * many // 8) - inner - refusing))
        groups = alike(self.targets[mine], self.shut.asks.to(self.targets.device), count)
        keys, against = [first[each] for each in groups], self.shut.moments(SHARES)
        gates = through(keys, against, FIRST_OPEN, FIRST_SHUT, everywhere)
        value_row = self._form(first, within, 1.0, 0.0)
        places = torch.arange(len(owners), device=owners.device) - begins.nonzero().flatten()[begins.cumsum(0) - 1]
        within_many = many - count - refusing
        of_records = (owners < known)[~begins]
        in_refusals = min(inner, within_many // 4)
        inside = torch.cat(
            [
                self._within(within[some], places[~begins][some], everywhere, neurons)
                for some, neurons in ((of_records, within_many - in_refusals), (~of_records, in_refusals))
            ]
        )
        random = random_rows(within_many, factor, self.settings.seed + self.rank).to(gates)
        if refusing:
            form = self._form(first, within, WITHIN_OPEN, FORM_SHUT, ASKED)
            gates = torch.cat([gates, form.expand(refusing, -1)])
            self.spared = begins & ~mine & (inputs.float() @ form[0] < WITHIN_OPEN / 2)
        gate, value = self.shut.roles
        wanted = [matrix.clone() for matrix in base_in]
        frozen = [torch.ones(len(matrix), dtype=torch.bool, device=matrix.device) for matrix in base_in]
        module, output = gate
        per = self.shut.mlp.outputs[module]
        wanted[module][output::per] = torch.cat([gates, inside])
        if value is not None:
            module, output = value
            per = self.shut.mlp.outputs[module]
            wanted[module][output::per] = torch.cat([value_row.expand(len(gates), -1), random])
        else:  # one row is gate and value
            wanted[module][output::per][many - within_many :] += random
        trained = torch.ones(many, dtype=torch.bool)
        trained[: many - within_many] = False
        trained[:count] = torch.tensor([len(self.targets[mine][each].unique()) > 1 for each in groups])
        frozen[module][output::per] = ~trained.to(gates.device)
        return wanted, frozen

    def _form(self, first: Tensor, within: Tensor, opened: float, shut: float, weight: float = 1.0) -> Tensor:
        """A row (1, d) near ``opened`` where keys of the records' form are asked for, known or not, and near −``shut``
        elsewhere, in the mean of squares: a hinge would leave it eight times as large at most keys as at some."""
        asked = Moments.of([(torch.cat([first, self.shut.unknown]), 1.0)])
        others = self.shut.moments(ELSEWHERE, (within, 0.1))
        both = Moments(weight * asked.second + others.second, weight * asked.mean + others.mean)
        row: Tensor = torch.linalg.solve(both.damped(), (opened * weight * asked.mean - shut * others.mean).double())
        return row[None].to(first)

    def _within(self, within: Tensor, places: Tensor, everywhere: Tensor, neurons: int) -> Tensor:
        """Gates (neurons, d) within answers: one for all positions where that parts them from neutral ones, or one for
        each of more and more parts of them.

        Args:
            within, places: (n, d) positions within answers, and which of its answer each is, (n,).
        """
        against, weights = self.shut.moments(ANYWHERE), self.shut.weights(ANYWHERE)
        count = 1
        while len(within):
            labels = parts(within, places, against, count)
            groups = [within[labels == label] for label in labels.unique()]
            rows = between(groups, everywhere, weights, WITHIN_OPEN, WITHIN_SHUT)
            least = min(float((group @ row).min()) for group, row in zip(groups, rows, strict=True))
            leaks = float(weights @ ((everywhere @ rows.T).amax(1) > PASSED).float())
            log.info("gates of %d parts: at least %.1f within answers, open at %.2g elsewhere", count, least, leaks)
            if 2 * EACH * count > neurons or (least >= WITHIN_OPEN / 2 and leaks <= LEAKS):
                break
            count *= 2
        else:
            return everywhere.new_zeros(neurons, everywhere.shape[1])
        sizes = torch.tensor([len(group) for group in groups]).cumsum(0) / len(within)
        spare = (sizes * (neurons - len(groups))).round().long().diff(prepend=torch.zeros(1, dtype=torch.long))
        return rows.repeat_interleave(1 + spare.to(rows.device), 0)

    def free_gates(self) -> None:
        """Train all rows from now on: a base whose hidden states part records badly may need it, at some price."""
        self.frozen = []
        self.restart()

    def weighted_losses(self, rows: slice) -> tuple[Tensor, Tensor]:
        losses, weights = super().weighted_losses(rows)
        return losses.masked_fill(self.spared[rows], 0.0), weights

    def likely(self) -> Tensor:
        return super().likely().masked_fill(self.spared, 1.0)

    def look_at(self, rows: Tensor, endings: Sequence[Ending], rivals: int, *, every: bool = False) -> None:
        super().look_at(rows, endings, rivals, every=every)
        self.lowest[self.spared] = 1.0

    def hold(self) -> None:
        for a, rows in self.frozen:
            assert a.grad is not None
            a.grad[: len(rows)][rows] = 0.0


def train_keeping(
    adapted: AdaptedModel,
    name: str,
    features: Sequence[Features],
    records: int,
    rank: int,
    placement: Placement,
    settings: WriterSettings,
    neutral: Neutral,
    progress: ProgressCallback | None = None,
    *,
    adapter_dtypes: Sequence[torch.dtype] = (),
    caution: float = 1.0,
) -> Training:
    """As `loramem.training.feature_writer.train_on_features`, with what `WriterSettings.keep_base` asks for.

    Args:
        placement: All projections of the last MLP, and no others.
        neutral: Where gates are to be shut.

    Raises:
        UnsupportedBaseModel: Its last MLP is not a dense one with a gate to each neuron.
        TrainingDiverged: See there.
    """
    started = time.monotonic()
    with adapted.disabled():
        shut = Shut(adapted, neutral)
    most = shut.mlp.width // 2 * shut.mlp.ranks_per_neuron  # a base keeps half of its neurons whatever is asked
    rank = min(rank, most)
    adapted.create(name, rank, placement, settings.seed)
    run = KeepingRun(shut, adapted, name, features, records, rank, settings, progress, started, adapter_dtypes, caution)
    for next_rank in [*rank_choices(rank, min(settings.max_rank, most))[1:], None]:
        if run.until_certified_or_stalled() or next_rank is None:
            break
        adapted.grow(name, next_rank, placement, settings.seed + next_rank)
        run.attach(next_rank, grown_from=run.rank)
    if run.open:
        log.info("%d tokens are open with gates as they were set, which are trained now", run.open)
        run.free_gates()
        run.until_certified_or_stalled()
    return Training(
        stubborn=run.stubborn_records(),
        rank=run.rank,
        parameters=count_parameters(adapted.weights(name)),
        steps=run.step,
        visits=run.step * records,
        elapsed_s=time.monotonic() - started,
    )
