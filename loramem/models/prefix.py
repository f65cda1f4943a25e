"""What prompts begin with alike, run once: the keys and values of its tokens, for every row that goes on from there."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, fields
from itertools import takewhile

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

SHARED_PREFIX_TOKENS = 16  # a chat template with a system prompt; below this the extra pass costs what it saves

_ARGUMENT = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


def cache_argument(cache: DynamicCache | None) -> dict[str, DynamicCache | None]:
    """Keys and values as a keyword argument of ``forward`` and ``generate``.

    Its name in transformers was ``past_key_values`` before 5.24, is ``cache`` since, and has no other from 5.40 on.
    """
    return {_ARGUMENT: cache}


@dataclass(frozen=True)
class Prefix:
    """Tokens and what a model computed of them; never changed, so that it serves any number of passes."""

    ids: tuple[int, ...]
    cache: DynamicCache

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, ids: Sequence[int]) -> "Prefix | None":
        """One pass over these tokens; None where that is not worth it or not exact (`can_be_shared`)."""
        if len(ids) < SHARED_PREFIX_TOKENS or not can_be_shared(model):
            return None
        cache = DynamicCache(config=model.config)
        tokens = torch.tensor([list(ids)], device=model.device)
        model(input_ids=tokens, **cache_argument(cache), use_cache=True, logits_to_keep=1)
        return cls(tuple(ids), cache)

    def begins(self, prompts: Sequence[Sequence[int]]) -> bool:
        """Whether every prompt begins with these tokens and goes on."""
        own = list(self.ids)
        return all(len(prompt) > len(own) and list(prompt[: len(own)]) == own for prompt in prompts)

    def rows(self, count: int) -> DynamicCache:
        """A cache for a batch of so many prompts. It grows by new tensors, so one row may look at these ones."""
        cache = copy(self.cache)
        cache.layers = [copy(layer) for layer in self.cache.layers]
        if count > 1:
            cache.batch_repeat_interleave(count)
        return cache


def common_prefix(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], kept: Prefix | None = None
) -> Prefix | None:
    """The longest that a batch may begin with: what was kept, or one pass over what else its prompts have in common."""
    shared = shared_prefix(model, prompts)
    if kept is not None and shared <= len(kept.ids) and kept.begins(prompts):
        return kept
    return Prefix.of(model, prompts[0][:shared])


def can_be_shared(model: PreTrainedModel) -> bool:
    """Whether a prefix may be run by itself. Padding then lies between it and the key, where a sliding window would
    count it and a recurrence would read it: such models run every prompt."""
    window = model.config.get_text_config().to_dict().get("sliding_window")
    return window is None and all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def shared_prefix(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts of a batch begin with, if running them once is worth it and exact; otherwise 0."""
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    same = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns)) if len(prompts) > 1 else 0
    return same if same >= SHARED_PREFIX_TOKENS and can_be_shared(model) else 0
