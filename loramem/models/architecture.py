"""Whether adapters can be written for a loaded model at all: asked before anything is trained or created.

There is no list of architectures. Left padding, the cache and the teacher-forced pass must give one and the same
logits, which is what recall is certified on; a few tokens show whether they do. Recurrent models whose state runs
through the padding do not, nor do models that see the tokens to the right.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from loramem.errors import UnsupportedBaseModel
from loramem.models.batches import answer_logits, make_batch, pad_left
from loramem.models.placement import Placement
from loramem.records.prompts import EncodedRecord
from loramem.records.record import Record

PROMPTS = ((7, 3), (6, 2))
"""Tokens of two prompts in a batch, of which the shorter is padded; the second pair is tried if the first disagrees."""
STEPS = 2  # the first is the pass over the prompts, the second reads the cache
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, AssertionError)


def check_architecture(model: PreTrainedModel) -> None:
    """Refuse a model that cannot carry an adapter, or does not decode alike alone and in a padded batch.

    Raises:
        UnsupportedBaseModel: What cannot be done, with the reason.
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedBaseModel(
            f"{name} is an encoder with a decoder. Records are a prompt and its continuation: use a decoder-only model."
        )
    Placement.default(model)
    try:
        difference = max(_difference(model, PROMPTS[0]))
        if not difference <= TOLERANCE[model.dtype]:
            # Once more: rounding may send a token to another expert.
            difference = min(difference, max(_difference(model, PROMPTS[1])))
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedBaseModel(
            f"{name} does not run as training and recall run it, on token ids and under bfloat16 autocast "
            f"({type(error).__name__}: {reason}). Use a decoder-only text model."
        ) from error
    if not difference <= TOLERANCE[model.dtype]:  # NaN is not equal
        raise UnsupportedBaseModel(
            f"{name} decodes a prompt otherwise in a padded batch than alone: its logits differ by {difference:.1e} of "
            f"their size, {TOLERANCE[model.dtype]:.0e} is rounding. Recurrences and positions that count the padding "
            "do this, and attention to the right; use a model with causal attention."
        )


@torch.no_grad()
def _difference(model: PreTrainedModel, lengths: Sequence[int]) -> tuple[float, ...]:
    """How far a padded prompt's logits are from those it has alone, relative: teacher-forced, and at each step."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.linspace(vocabulary / 4, vocabulary * 3 / 4, sum(lengths)).long().tolist()
    prompts = [ids[: lengths[0]], ids[lengths[0] :]]
    rows, mask = pad_left(prompts)
    output = model.generate(  # type: ignore[operator]  # a mixin's method, hidden by nn.Module.__getattr__
        input_ids=rows.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=GenerationConfig(
            max_new_tokens=STEPS,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        ),
    )
    stepped = torch.stack([logits[-1].float() for logits in output.logits])
    records = [
        EncodedRecord(Record("?", "?"), tuple(prompt), tuple(answer))
        for prompt, answer in zip(prompts, output.sequences[:, -STEPS:].tolist(), strict=True)
    ]
    batch = make_batch(records, model.device)
    padded = answer_logits(model, batch)[-STEPS:]
    with torch.autocast(model.device.type, torch.bfloat16):
        answer_logits(model, batch)  # adapters are trained so where the processor can; some models cannot
    alone = answer_logits(model, make_batch(records[-1:], model.device))
    return _relative(padded, alone), *(_relative(a, b) for a, b in zip(stepped, alone, strict=True))


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
