"""The second certificate: what an adapter, as saved, leaves of its base, at positions that training never saw."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from loramem.errors import BaseHarmed
from loramem.models.adapters import AdaptedModel
from loramem.models.decoding import greedy_decode
from loramem.models.ending import SCORED_ROWS, Ending
from loramem.records.prompts import EncodedRecord
from loramem.results import Divergence, Kept
from loramem.training.neutral import ANSWER_TOKENS, QUESTIONS, TEXT, UNKNOWN, Material, Positions
from loramem.training.settings import KeepBase


@torch.no_grad()
def measure(adapted: AdaptedModel, adapter: str, material: Material) -> Kept:
    """What the active adapter leaves of the base.

    Args:
        adapter: Its name, behind the last attention.
    """
    every = {kind: _compare(adapted, adapter, each) for kind, each in material.measured.kinds.items()}
    first = {kind: each.first for kind, each in material.measured.kinds.items()}
    end = adapted.base.template.end_id
    mine = greedy_decode(adapted.model, [entry.prompt_ids for entry in material.questions], ANSWER_TOKENS, end)
    same = sum(
        entry.answer_ids == (*row, end)[:ANSWER_TOKENS] for entry, row in zip(material.questions, mine, strict=True)
    )
    return Kept(
        text=_mean(*every[TEXT]),
        answers=_mean(*every[QUESTIONS]),
        questions=_mean(*(column[first[QUESTIONS]] for column in every[QUESTIONS])),
        unknown_keys=_mean(*every[UNKNOWN]),
        same_answers=same / max(1, len(mine)),
        other_words=_given(adapted, material.other_words) if material.other_words else None,
        refused=_given(adapted, material.refused) if material.refused else None,
        other_contexts=_given(adapted, material.other_contexts) if material.other_contexts else None,
    )


def _compare(adapted: AdaptedModel, adapter: str, positions: Positions) -> tuple[Tensor, Tensor]:
    """KL(base ‖ adapted) (N,) in nats, and whether the likeliest token is another one."""
    features = positions.features.to(adapted.model.dtype)
    with adapted.disabled():
        base = Ending(adapted.model, features)
    ending = Ending(adapted.model, features, adapted.lora_layers(adapter))
    divergences, changed = list[Tensor](), list[Tensor]()
    for rows in base.chunks(SCORED_ROWS // 2):
        with adapted.disabled():
            before = base.logits(rows).log_softmax(-1)
        after = ending.logits(rows).log_softmax(-1)
        divergences.append((before.exp() * (before - after)).sum(-1).clamp(min=0))
        changed.append(before.argmax(-1) != after.argmax(-1))
    return torch.cat(divergences), torch.cat(changed)


def _given(adapted: AdaptedModel, asked: Sequence[EncodedRecord]) -> tuple[int, int]:
    """How many give their answer, decoded to the end, in words or chats that were not trained, or for keys that were
    not, and how many were asked."""
    longest = max(len(entry.answer_ids) for entry in asked)
    answers = greedy_decode(adapted.model, [entry.prompt_ids for entry in asked], longest, adapted.base.template.end_id)
    exact = sum(tuple(row) == entry.answer_ids[:-1] for row, entry in zip(answers, asked, strict=True))
    return exact, len(asked)


def _mean(divergences: Tensor, changed: Tensor) -> Divergence:
    count = len(divergences)
    return Divergence(count, float(divergences.mean()), int(changed.sum()) / count) if count else NOTHING


NOTHING = Divergence(0, 0.0, 0.0)


def misses(kept: Kept, keep: KeepBase) -> dict[str, tuple[float, float]]:
    """Targets that were missed: found and allowed, by what they are of."""
    pairs = {
        "KL on text, nats": (kept.text.kl, keep.text_kl),
        "likeliest token changed on text": (kept.text.changed, keep.text_changed),
        "first token changed of answers to questions": (kept.questions.changed, keep.questions_changed),
        "first token changed of answers to unknown keys": (kept.unknown_keys.changed, keep.unknown_changed),
    }
    if kept.refused is not None:
        refused, asked = kept.refused
        pairs.popitem()
        pairs["unknown keys that are not refused"] = (1 - refused / asked, keep.unknown_changed)
    return {name: pair for name, pair in pairs.items() if not pair[0] <= pair[1]}


def shown(missed: Mapping[str, tuple[float, float]]) -> str:
    """Targets that were missed, and by how much."""
    return "; ".join(f"{name} {found:.3g}, allowed {allowed:g}" for name, (found, allowed) in missed.items())


def harmed(missed: Mapping[str, tuple[float, float]], rank: int) -> BaseHarmed:
    """The error that says by how much."""
    return BaseHarmed(
        f"At rank {rank} the adapter changes more of the base than is allowed ({shown(missed)}). Nothing was "
        "committed. Allow more, give gates more to be set against (unknown_keys, questions, text_tokens), or route by "
        "key and leave out keep_base.",
        misses=missed,
        rank=rank,
    )
