"""How many of the base's answers to the fifty held-out questions survive a mere rounding of the base to bfloat16.

That is a natural limit to "same answers" of the second certificate, which compares 24 tokens, decoded greedily: where
the base is nearly undecided any change, however small, begins another text.

python -m tests.benchmarks.same_answers MODEL
"""

import argparse
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from loramem.models.base_model import load_base_model
from loramem.models.decoding import greedy_decode
from loramem.training.neutral import ANSWER_TOKENS
from loramem.training.neutral_text import held_out_questions

Row = Sequence[int]


def first_difference(one: Row, other: Row) -> int:
    """Where two answers part."""
    return next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))


def margin(model: PreTrainedModel, prompt: Row, answer: Row, at: int) -> float:
    """By how much the likeliest token at a place of an answer is likelier than the next."""
    ids = torch.tensor([[*prompt, *answer[:at]]])
    first, second = model(input_ids=ids).logits[0, -1].float().softmax(-1).topk(2).values.tolist()
    return float(first - second)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    name = parser.parse_args().model
    exact, half = (load_base_model(name, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16"))
    end = exact.template.end_id
    prompts = [exact.template.prompt_ids(exact.tokenizer, question) for question in held_out_questions()]

    def together(model: PreTrainedModel) -> list[list[int]]:
        return greedy_decode(model, prompts, ANSWER_TOKENS, end)

    def alone(model: PreTrainedModel) -> list[list[int]]:
        return [greedy_decode(model, [prompt], ANSWER_TOKENS, end)[0] for prompt in prompts]

    whole, rounded = together(exact.model), together(half.model)
    for what, one, other in (
        ("float32, together and alone", whole, alone(exact.model)),
        ("float32 and bfloat16, together", whole, rounded),
        ("bfloat16, together and alone", rounded, alone(half.model)),
    ):
        print(f"{what}: {sum(map(list.__eq__, one, other))} of {len(prompts)} answers are the same")
    parted = [index for index, pair in enumerate(zip(whole, rounded, strict=True)) if pair[0] != pair[1]]
    places = [first_difference(whole[index], rounded[index]) for index in parted]
    margins = [margin(exact.model, prompts[index], whole[index], at) for index, at in zip(parted, places, strict=True)]
    print(f"they part at the tokens {sorted(places)}, where the likeliest token is ahead by at most {max(margins):.3f}")


if __name__ == "__main__":
    main()
