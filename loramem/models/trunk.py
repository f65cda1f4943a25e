"""What lies below the lowest adapted layer: a constant of each record, run once and cached.

Training steps and teacher-forced checks then run only the tail. The split uses the model's own forward: layers below
the adapter hand on the cached hidden states in place of computing them, and everything else (masks, position
embeddings, soft-capping, sliding windows) is done by the architecture's own code, afresh for every batch.

Of what the last layer gives, only answer positions are read: its MLP runs on these columns alone.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from loramem._util.out_of_memory import is_out_of_memory
from loramem.models.batches import Batch, answer_logits, group_by_length, make_batch
from loramem.models.layers import decoder_layers, position_wise_blocks
from loramem.records.prompts import EncodedRecord

log = logging.getLogger(__name__)

CACHE_BYTES = 2**31
"""Hidden states kept on the compute device; records beyond this budget are kept in host memory."""
TRUNK_RECORDS, TRUNK_TOKENS = 64, 32_768
SPLIT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest difference between tail and full logits that counts as rounding, as a share of the logits' scale."""

Forward = Callable[..., Tensor]


class _Reached(Exception):
    """The hidden states that enter the first adapted layer are known; nothing above has to run."""


class Trunk:
    """Cached hidden states of a set of records, and the tail's logits from them.

    Args:
        model: The base, with or without adapters in layers ``first_layer`` and up.
        records: What will be asked for, by index.
        first_layer: Lowest adapted layer (0-based).
        cache_bytes: Budget on the compute device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        records: Sequence[EncodedRecord],
        first_layer: int,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.model, self.records = model, records
        self._layers = decoder_layers(model)  # finding them takes a look at every module
        self.first_layer = first_layer if first_layer and splits_exactly(model, first_layer, records) else 0
        self._hidden: list[Tensor] = []
        if self.first_layer:
            self._hidden = self._run(cache_bytes)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The records as a padded batch on the model's device."""
        return make_batch([self.records[index] for index in indices], self.model.device)

    def logits(self, indices: Sequence[int], batch: Batch) -> Tensor:
        """Logits (N, V) in float32 of the N supervised positions of ``batch``, through the tail alone.

        Args:
            indices: The batch's records.
            batch: From `batch`.
        """
        if not self.first_layer:
            return answer_logits(self.model, batch)
        hidden = self._gather(indices, batch)
        return _tail_logits(self.model, self._layers, self.first_layer, hidden, batch)

    @property
    def bytes(self) -> int:
        """Size of the cache."""
        return sum(hidden.nbytes for hidden in self._hidden)

    @torch.no_grad()
    def _run(self, cache_bytes: int) -> list[Tensor]:
        cached: list[Tensor] = [torch.empty(0)] * len(self.records)
        used = 0
        for indices in group_by_length(self.records, range(len(self.records)), TRUNK_RECORDS, TRUNK_TOKENS):
            hidden = entering(self.model, self.first_layer, self.batch(indices))
            for row, index in enumerate(indices):
                # A copy: a slice would keep the padded batch alive.
                mine = hidden[row, -self.records[index].total_tokens :].clone()
                used += mine.nbytes
                cached[index] = mine if used <= cache_bytes else mine.cpu()
        if used > cache_bytes:
            log.info("hidden states of %d bytes exceed the budget of %d; the rest is in host memory", used, cache_bytes)
        return cached

    def _gather(self, indices: Sequence[int], batch: Batch) -> Tensor:
        width = batch.input_ids.shape[1]
        hidden = self._hidden[indices[0]]
        # Padding is never attended to; zeros keep it finite.
        padded = hidden.new_zeros(len(indices), width, hidden.shape[-1], device=self.model.device)
        for row, index in enumerate(indices):
            mine = self._hidden[index]
            padded[row, width - len(mine) :] = mine
        return padded


@torch.no_grad()
def entering(model: PreTrainedModel, layer: int, batch: Batch) -> Tensor:
    """Hidden states (B, T, d) that enter decoder layer ``layer``; the layers above are not run."""
    found: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    handle = decoder_layers(model)[layer].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        answer_logits(model, batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


def _tail_logits(model: PreTrainedModel, layers: nn.ModuleList, layer: int, hidden: Tensor, batch: Batch) -> Tensor:
    """As `answer_logits`, with ``hidden`` (B, T, d) entering ``layer`` and nothing computed below it."""
    forwards: dict[nn.Module, Forward] = {below: lambda *_, **__: hidden for below in layers[:layer]}
    for block in position_wise_blocks(layers[-1]):
        # The column before the first target predicts it.
        forwards[block] = _on_last_columns(block.forward, batch.targets.shape[1] + 1)
    with replaced_forwards(forwards):
        return answer_logits(model, batch)


def _on_last_columns(forward: Forward, columns: int) -> Forward:
    """``forward`` of (B, T, d) computed for the last columns alone; the others are zeros."""

    def narrowed(hidden: Tensor) -> Tensor:
        # Contiguous, because GPT-2's modules view it in another shape.
        return pad(forward(hidden[:, -columns:].contiguous()), (0, 0, max(0, hidden.shape[1] - columns), 0))

    return narrowed


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Within this context these modules compute what they are given here."""
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, original in before.items():
            if original is None:
                del module.forward
            else:
                module.forward = original


@torch.no_grad()
def splits_exactly(model: PreTrainedModel, layer: int, records: Sequence[EncodedRecord]) -> bool:
    """Whether the tail alone gives the full model's logits, tried on the shortest and the longest record.

    What it cannot split (layers that share keys and values, or take more than the hidden states of the one below)
    is run whole: correct and slower. Exhausted memory and what fails without a split are raised as they are.
    """
    ordered = sorted(records, key=lambda record: record.total_tokens)
    batch = make_batch([ordered[0], ordered[-1]], model.device)
    full = answer_logits(model, batch)  # what fails here fails without a split as well
    try:
        hidden = entering(model, layer, batch)
        # Other tokens in between: what a lower layer leaves behind for those above must not be of this very batch.
        answer_logits(model, replace(batch, input_ids=batch.input_ids.roll(1, dims=1)))
        tail = _tail_logits(model, decoder_layers(model), layer, hidden, batch)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        log.warning("%s cannot be split at layer %d (%s); every layer is run", type(model).__name__, layer, error)
        return False
    difference = float((full - tail).abs().max() / full.abs().max())
    if not difference <= SPLIT_TOLERANCE[model.dtype]:  # NaN is not equal
        log.warning(
            "%s split at layer %d differs by %.1e of the logits' scale; every layer is run",
            type(model).__name__,
            layer,
            difference,
        )
        return False
    return True
