"""Features: what the position-wise end of a model sees at answer positions, a constant of each record.

After the last attention nothing mixes positions. So an adapter that sits behind it (in the output projection of the
last attention, or in the last MLP) sees at each answer position an input that no step of training changes. One frozen
pass collects these inputs; training then runs the end of the model alone (`loramem.models.ending`).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loramem.errors import UnsupportedBaseModel
from loramem.models.batches import Batch, Batches, answer_logits, shuffled
from loramem.models.decoding import forced_batch, greedy_decode
from loramem.models.layers import LastLayer
from loramem.records.prompts import EncodedRecord

PASS_RECORDS, PASS_TOKENS = 61, 4096
"""Of a batch: another size, order, neighbours and padding than in free-running decoding, so that what is read from
features is the second composition of a proof."""
HIDDEN = ("entering", "attended", "mixed")
"""Columns of `Features` that passes through the model give."""


@dataclass(frozen=True)
class Features:
    """N answer positions of a set of records: for each what enters the model's end there.

    Attributes:
        tokens, positions: (N,) the token at each position and its place in the sequence.
        targets: (N,) the token that is to be predicted there.
        owners: (N,) index of the record.
        entering: (N, d) hidden states that enter the last layer.
        attended: (N, d) what its attention gives.
        mixed: (N, a) what enters the attention's output projection; as ``attended`` where that is not known.
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    owners: Tensor
    entering: Tensor
    attended: Tensor
    mixed: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    @classmethod
    def joined(cls, parts: Sequence["Features"]) -> "Features":
        """The positions of all parts, one part after the other."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def first(self, count: int) -> "Features":
        """The first ``count`` positions, not copied."""
        return Features(*(getattr(self, field.name)[:count] for field in fields(self)))

    @property
    def size_bytes(self) -> int:
        return sum(getattr(self, field.name).nbytes for field in fields(self))

    def to(self, dtype: torch.dtype) -> "Features":
        """The same with hidden states in another dtype."""
        columns = (getattr(self, field.name) for field in fields(self))
        return Features(*(values.to(dtype) if values.is_floating_point() else values for values in columns))


class _Collected(Exception):
    """The last attention is done; nothing above has to run."""


@torch.no_grad()
def collect(model: PreTrainedModel, records: Sequence[EncodedRecord], batches: Batches | None = None) -> Features:
    """Features of records, in their order: one pass through every layer but the last MLP, a common prefix run once.

    Args:
        batches: Indices that are run together, each in one batch; the second composition of a proof if None.

    Raises:
        UnsupportedBaseModel: The last layer has no single attention, or its attention does more after its projection.
    """
    last = LastLayer.of(model)
    parts: dict[int, Features] = {}
    for indices in shuffled(records, PASS_RECORDS, PASS_TOKENS) if batches is None else batches:
        batch = forced_batch(model, [records[index] for index in indices])
        seen = _run_to_the_last_attention(model, last, batch)
        columns = slice(-batch.targets.shape[1] - 1, -1)  # the column before a target predicts it
        owners = torch.tensor(indices, device=model.device)[:, None].expand_as(batch.targets)
        hidden = (seen[name][:, columns] for name in HIDDEN)
        every = (batch.input_ids[:, columns], batch.position_ids[:, columns], batch.targets, owners, *hidden)
        taken = [
            values[batch.supervised].split([len(records[index].answer_ids) for index in indices]) for values in every
        ]
        parts |= {index: Features(*columns) for index, *columns in zip(indices, *taken, strict=True)}
    return Features.joined([parts[index] for index in range(len(records))])


@torch.no_grad()
def collect_decoding(
    model: PreTrainedModel, records: Sequence[EncodedRecord], features: Features, batches: Batches
) -> Features:
    """Features of the same positions as decoding meets them, token by token in the given batches of indices: products
    of another shape round otherwise. Of records that are in no batch those that are known.

    Args:
        features: From `collect`, of these records.
    """
    counts = features.owners.bincount().tolist()
    known = zip(*(getattr(features, name).split(counts) for name in HIDDEN), strict=True)
    rows = {index: list(values) for index, values in enumerate(known)}
    for indices in batches:
        prompts, answers = zip(
            *((records[index].prompt_ids, records[index].answer_ids) for index in indices), strict=True
        )
        longest = max(map(len, answers))
        with _watched(LastLayer.of(model)) as passes:
            greedy_decode(model, prompts, longest, answers[0][-1], forced=answers)
        steps = passes[-longest:]  # the first may be of a common prefix
        hidden = [torch.stack([seen[name][:, -1] for seen in steps], 1) for name in HIDDEN]  # (B, longest, …)
        for row, index in enumerate(indices):
            rows[index] = [values[row, : len(answers[row])] for values in hidden]
    columns = zip(*(rows[index] for index in range(len(records))), strict=True)
    return replace(features, **{name: torch.cat(values) for name, values in zip(HIDDEN, columns, strict=True)})


def _run_to_the_last_attention(model: PreTrainedModel, last: LastLayer, batch: Batch) -> dict[str, Tensor]:
    """Hidden states (B, T, …) that enter the last layer, its attention's projection, and what that gives."""

    def stop(*_: Any) -> None:
        raise _Collected

    with _watched(last) as passes, suppress(_Collected):
        handle = last.attention.register_forward_hook(stop)
        try:
            answer_logits(model, batch)
        finally:
            handle.remove()
    (seen,) = passes
    if not torch.equal(seen["projected"], seen["attended"]):
        raise UnsupportedBaseModel(f"{type(last.attention).__name__} does not end in its output projection.")
    return seen


@contextmanager
def _watched(last: LastLayer) -> Iterator[list[dict[str, Tensor]]]:
    """The same of every pass, as it is run; "projected" is what the projection gave."""
    passes = list[dict[str, Tensor]]()

    def enters(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        passes.append({"entering": args[0] if args else kwargs["hidden_states"]})

    def mixes(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        passes[-1] |= {"mixed": args[0]}

    def projects(_: nn.Module, __: Any, output: Tensor) -> None:
        passes[-1] |= {"projected": output}

    def attended(_: nn.Module, __: Any, output: Any) -> None:
        given = output[0] if isinstance(output, tuple) else output
        passes[-1] = {"mixed": given, "projected": given, **passes[-1], "attended": given}

    with ExitStack() as hooks:
        hooks.callback(last.layer.register_forward_pre_hook(enters, with_kwargs=True).remove)
        if last.projection is not None:
            # Before it comes to eight bits, which an adapter does not see.
            hooks.callback(last.projection.register_forward_pre_hook(mixes, prepend=True).remove)
            hooks.callback(last.projection.register_forward_hook(projects).remove)
        hooks.callback(last.attention.register_forward_hook(attended).remove)
        yield passes
