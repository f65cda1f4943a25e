"""Training that leaves the base as it is elsewhere: the records take neurons of the last MLP that it hardly uses.

An adapter of rank r on all projections of the last MLP replaces r neurons (`loramem.models.neurons`). What they give at
neutral positions (`loramem.training.neutral`) is pulled to nothing while the records keep their objective and their
certificate: gates learn to open at the records' positions alone. A step costs little, as it runs r neurons in the place
of the network, and many thousand positions take part in each.

The divergence at a neutral position is estimated, since a softmax over the vocabulary at each would take most of the
time: KL(base ‖ adapted) is about half of dᵀFd for a small change d of what enters the head, F the Fisher information
of the base's predictions, here their mean over neutral positions; large changes count by their length, as the
divergence itself grows. The tokens of the records, which are what an adapter would say anywhere, are looked at one by
one. The estimate decides nothing: what an adapter leaves of the base is measured on the adapter as saved
(`loramem.training.kept`).
"""

import math
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
from loramem.training.neutral import QUESTIONS, TEXT, UNKNOWN, Neutral
from loramem.training.progress import ProgressCallback, Training
from loramem.training.settings import KeepBase, WriterSettings
from loramem.training.whitening import Site, random_rows, whitening_factor

SHARES = {
    (TEXT, False): 0.3,
    (QUESTIONS, False): 0.25,
    (QUESTIONS, True): 0.15,
    (UNKNOWN, False): 0.05,
    (UNKNOWN, True): 0.25,
}
"""Of a step's neutral positions, by kind and whether an answer begins there; in text none does."""
BATCH, READ = 4096, 16_384
"""Neutral positions of a step, and of a pass over all of them."""
SAMPLED, SCORED = 1_000, 500
"""Positions per kind that the Fisher information is the mean over, and how many are unembedded together."""
MIXED = 0.4
"""Half of the drawn positions are moved towards another of their group by up to this share: there are more unknown
keys and questions than were collected, and most lie between those that were."""
INFORMATION = 0.99
"""Share of the Fisher information that is looked at, in as few directions as hold it."""
WARM_UP, LOWEST_RATE = 20, 0.05
"""Steps in which the rate rises, and what it falls to."""
LEAST_WEIGHT = 0.05
"""Share of the records' tokens that their loss is at least the mean over: a few open ones do not outweigh the base."""
LOOK_STEPS = 64
"""Steps between looks over the whole vocabulary, for the sake of tokens that no one thought of."""


class Quiet:
    """Neutral positions as a loss: how much of the base an adapter would change there.

    Built while the model is the plain base.

    Args:
        tokens: (t,) those of the records.
    """

    def __init__(self, adapted: AdaptedModel, neutral: Neutral, tokens: Tensor, seed: int) -> None:
        self.adapted, self.tokens = adapted, tokens
        self.mlp = LastMlp.of(adapted.model)
        self._dtype = adapted.model.dtype
        self._parts = list(neutral.kinds.values())
        self.features = Features.joined([part.features for part in self._parts])
        self._groups = _groups(neutral)
        inputs, outputs, used = list[Tensor](), list[Tensor](), torch.zeros(self.mlp.width)
        sampler = torch.Generator().manual_seed(seed)
        for part in self._parts:
            for rows in torch.arange(len(part)).split(READ):
                hidden, given = self._ending(_at(part.features, rows)).block_values(self.mlp.block)
                used += self.mlp.use(hidden).cpu()
                inputs.append(hidden.to(torch.bfloat16))
                outputs.append(given.to(torch.bfloat16))
        self.inputs, self.outputs = torch.cat(inputs), torch.cat(outputs)
        self.least_used = used.argsort()
        """(width,) neurons, those first that matter least at neutral positions."""
        self._look(sampler)

    def moments(self) -> Tensor:
        """Second moments (d, d) of what enters the MLP, every group of positions alike by its share."""
        total = torch.zeros(self.inputs.shape[1], self.inputs.shape[1], device=self.inputs.device)
        for rows, share in self._groups:
            for some in rows.split(READ):
                part = self.inputs[some].float()
                total += part.T @ part * (share / len(rows))
        return total

    def loss(self, neurons: Tensor, weights: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """Mean estimate of KL(base ‖ adapted) in nats at positions drawn anew.

        Args:
            neurons: Which are replaced.
            weights: What they become (`LastMlp.weights`).
        """
        rows, others = (torch.cat([self._drawn(*each, generator) for each in self._groups]) for _ in range(2))
        share = MIXED * torch.rand(len(rows), 1, generator=generator, device=rows.device)
        share = torch.where(share > MIXED / 2, share, 0.0)  # half of them as they are

        def between(values: Tensor) -> Tensor:
            return torch.lerp(values[rows].float(), values[others].float(), share)

        hidden, given = between(self.inputs), between(self.outputs)
        mixed = {name: between(getattr(self.features, name)) for name in ("entering", "attended")}
        ending = self._ending(replace(_at(self.features, rows), **mixed))
        with torch.no_grad():
            before = ending.hidden(slice(None), {self.mlp.block: given.to(self._dtype)}).float()
            given = given - self.mlp.given(hidden, neurons, self.mlp.weights(neurons))  # each adds to the sum
        given = given + self.mlp.given(hidden, neurons, weights)
        change = ending.hidden(slice(None), {self.mlp.block: given.to(self._dtype)}).float() - before
        quadratic = (change @ self._root).square().sum(1)
        divergence: Tensor = ((1 + quadratic).sqrt() - 1).mean()
        return divergence + self._of_tokens(before, change, rows)

    @staticmethod
    def _drawn(group: Tensor, share: float, generator: torch.Generator) -> Tensor:
        return group[torch.randint(len(group), (round(BATCH * share),), generator=generator, device=group.device)]

    def _of_tokens(self, before: Tensor, change: Tensor, rows: Tensor) -> Tensor:
        """KL between predictions of which the records' tokens are told apart and all others are one."""
        with torch.no_grad():
            mine = before @ self._rows.T + self._bias - self.totals[rows, None]
            rest = torch.log1p(-mine.exp().sum(1, keepdim=True).clamp(max=1 - 1e-4))
            base = torch.cat([mine, rest], 1).log_softmax(1)  # of a mixed position log Σ exp is near that of its parts
        moved = change @ (self._rows - self._mean_row).T
        after = torch.cat([base[:, :-1] + moved, base[:, -1:]], 1).log_softmax(1)
        return (base.exp() * (base - after)).sum(1).mean()

    @torch.no_grad()
    def _look(self, sampler: torch.Generator) -> None:
        """The head's side of it: the Fisher information, the records' tokens, and log Σ exp of every position."""
        head = self.adapted.model.get_output_embeddings()
        parameters = {name: values.detach() for name, values in head.named_parameters()}
        matrix, bias = parameters["weight"].float(), parameters.get("bias")
        self._rows, self._mean_row = matrix[self.tokens], matrix.mean(0)
        self._bias = torch.zeros((), device=matrix.device) if bias is None else bias[self.tokens].float()
        half = matrix.to(torch.bfloat16)
        every = torch.zeros(len(matrix), device=matrix.device)
        outer = torch.zeros(matrix.shape[1], matrix.shape[1], device=matrix.device)
        count, first, totals = 0, 0, list[Tensor]()
        for part in self._parts:
            sampled = torch.randperm(len(part), generator=sampler)[:SAMPLED]
            chosen = torch.zeros(len(part), dtype=torch.bool)
            chosen[sampled] = True
            for rows in torch.arange(len(part)).split(SCORED):
                given = self.outputs[first + rows].to(self._dtype)
                hidden = self._ending(_at(part.features, rows)).hidden(slice(None), {self.mlp.block: given})
                logits = (hidden.to(torch.bfloat16) @ half.T).float()
                if bias is not None:
                    logits += bias.float()
                totals.append(logits.logsumexp(1))
                if len(picked := chosen[rows].nonzero().flatten()):
                    probs = logits[picked].softmax(1)
                    means = probs @ matrix
                    every += probs.sum(0)
                    outer += means.T @ means
                    count += len(picked)
            first += len(part)
        self.totals = torch.cat(totals)
        fisher = ((matrix.T * (every / count)) @ matrix - outer / count).double()
        values, vectors = torch.linalg.eigh((fisher + fisher.T) / 2)  # ascending
        values = values.clamp(min=0)
        many = values.cumsum(0) > (1 - INFORMATION) * values.sum()
        self._root = (vectors * values.sqrt())[:, many].float()

    def _ending(self, features: Features) -> Ending:
        return Ending(self.adapted.model, features.to(self._dtype))


def _groups(neutral: Neutral) -> list[tuple[Tensor, float]]:
    """Positions that are drawn from together, and their share of a step."""
    found, start = list[tuple[Tensor, float]](), 0
    for kind, part in neutral.kinds.items():
        begins = torch.zeros_like(part.first) if kind == TEXT else part.first
        for which in (False, True):
            rows = start + (begins == which).nonzero().flatten()
            if len(rows):
                found.append((rows, SHARES[kind, which]))
        start += len(part)
    total = sum(share for _, share in found)
    return [(rows, share / total) for rows, share in found]


def _at(features: Features, rows: Tensor) -> Features:
    """The features of some positions."""
    return replace(features, **{name: values[rows] for name, values in vars(features).items()})


class KeepingRun(FeatureRun):
    """Training on all projections of the last MLP, of which an adapter replaces some neurons and no others."""

    def __init__(self, quiet: Quiet, keep: KeepBase, *args: Any) -> None:
        self.quiet, self.keep, self.begun, self.neutral_loss = quiet, keep, 0, math.inf
        super().__init__(*args)

    def begin(self, layers: Sequence[LoraLayer], grown_from: int) -> list[Site]:
        """B of the projections into the neurons and A of the one out of them pick the neurons, and stay so."""
        mlp = self.quiet.mlp
        per = mlp.ranks_per_neuron
        self.neurons = self.quiet.least_used[: self.rank // per].to(self.targets.device)
        modules = {mlp.block.get_submodule(path): path for path in mlp.paths}
        ordered = sorted(layers, key=lambda layer: mlp.paths.index(modules[layer]))
        *base_in, base_out = mlp.weights(self.neurons)
        mine = self.finite(self.ending.moments(ordered[0]))
        factor = whitening_factor((mine + self.quiet.moments().to(mine)) / 2)
        sites, known = list[Site](), grown_from // per
        self.layers = ordered
        with torch.no_grad():
            for index, (layer, matrix) in enumerate(zip(ordered[:-1], base_in, strict=True)):
                a, b = layer.lora_A[self.name].weight, layer.lora_B[self.name].weight
                rows = mlp.rows(index, self.neurons).flatten()
                fresh = slice(known * mlp.outputs[index], len(rows))
                wanted = random_rows(len(rows) - fresh.start, factor, self.settings.seed + self.rank + index)
                a[fresh] = (wanted - matrix[fresh]) / layer.scaling[self.name]
                b.zero_()
                b[rows, torch.arange(len(rows))] = 1.0
                sites.append(Site(a, b, factor, 1.0, step_a=1 / layer.scaling[self.name], moves_b=False))
            out = ordered[-1]
            a, b = out.lora_A[self.name].weight, out.lora_B[self.name].weight
            a.zero_()
            a[torch.arange(len(self.neurons)), self.neurons] = 1.0
            b[:, known : len(self.neurons)] = -base_out[:, known:] / out.scaling[self.name]
        identity = torch.eye(a.shape[1], device=a.device)
        scale = self.ending.scale(out) / out.scaling[self.name]
        return [*sites, Site(a, b, identity, scale, moves_a=False)]

    def weights_now(self) -> list[Tensor]:
        """What the replaced neurons are (`LastMlp.weights`), as functions of what is trained."""
        mlp, count = self.quiet.mlp, len(self.neurons)
        *base_in, base_out = mlp.weights(self.neurons)
        *into, out = self.layers
        now = [
            matrix + layer.scaling[self.name] * layer.lora_A[self.name].weight[: len(matrix)]
            for matrix, layer in zip(base_in, into, strict=True)
        ]
        return [*now, base_out + out.scaling[self.name] * out.lora_B[self.name].weight[:, :count]]

    def whole_weight(self, total: float) -> float:
        return max(total, LEAST_WEIGHT * len(self.targets))

    def pull_elsewhere(self, weight: float) -> None:
        loss = self.quiet.loss(self.neurons, self.weights_now(), self.generator)
        (loss * self.keep.weight * weight).backward()
        self.neutral_loss = float(loss.detach())

    def rate_factor(self, open_share: float) -> float:
        done = min(1.0, (self.step - self.begun) / self.keep.steps)
        cosine = LOWEST_RATE + (1 - LOWEST_RATE) * (1 + math.cos(math.pi * done)) / 2
        return min(1.0, (self.step - self.begun + 1) / WARM_UP) * cosine * self.decay

    def until_certified_or_stalled(self) -> bool:
        """All steps of the schedule; then, at its lowest rate, more until every token is certified."""
        self.begun = self.step
        while self.step - self.begun < self.keep.steps:
            open_tokens, open_loss, loss = self.train_step()
            if not math.isfinite(loss):
                self.recover()
                continue
            if (self.step - self.begun) % LOOK_STEPS == 0:
                self.remember()
                self.look_at_low(self.likely())
            self.report(open_tokens, loss)
            self.note_progress(open_tokens, open_loss)
        if self.check(1, every=True):
            return True
        self.best.step = self.step
        return super().until_certified_or_stalled()

    def note_progress(self, open_tokens: int, loss: float) -> None:
        super().note_progress(open_tokens, loss)
        self.decay = 1.0  # the schedule has the rate


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
        neutral: To train with.

    Raises:
        UnsupportedBaseModel: Its last MLP is not a dense one.
        TrainingDiverged: See there.
    """
    assert settings.keep_base is not None
    started = time.monotonic()
    with adapted.disabled():
        quiet = Quiet(adapted, neutral, features[0].targets.unique(), settings.seed)
    most = quiet.mlp.width // 2 * quiet.mlp.ranks_per_neuron  # a base keeps half of its neurons whatever is asked
    rank = min(rank, most)
    adapted.create(name, rank, placement, settings.seed)
    keep, within = settings.keep_base, replace(settings, feature_rate=settings.keep_base.rate)
    run = KeepingRun(
        quiet, keep, adapted, name, features, records, rank, within, progress, started, adapter_dtypes, caution
    )
    for next_rank in [*rank_choices(rank, min(settings.max_rank, most))[1:], None]:
        if run.until_certified_or_stalled() or next_rank is None:
            break
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
