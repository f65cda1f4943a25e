"""What a base can do besides: fifty questions with known answers, asked before an adapter is attached and after.

The other half, next-token accuracy and perplexity on text, is of `loramem.suites.divergence`.
"""

import re
from collections.abc import Sequence

import torch

from loramem.models.base_model import BaseModel
from loramem.models.decoding import greedy_decode

ANSWER_TOKENS = 24
QUESTIONS = (
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Italy?", "Rome"),
    ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of Germany?", "Berlin"),
    ("What is the capital of Spain?", "Madrid"),
    ("What is the capital of Egypt?", "Cairo"),
    ("What is the capital of Russia?", "Moscow"),
    ("What is the capital of England?", "London"),
    ("What is the capital of Greece?", "Athens"),
    ("What is the capital of China?", "Beijing"),
    ("Which planet do we live on?", "Earth"),
    ("Which planet is the largest in our solar system?", "Jupiter"),
    ("Which planet is closest to the Sun?", "Mercury"),
    ("Which star is closest to the Earth?", "Sun"),
    ("How many days are there in a week?", "seven|7"),
    ("How many months are there in a year?", "twelve|12"),
    ("How many hours are there in a day?", "24|twenty-four"),
    ("How many minutes are there in an hour?", "60|sixty"),
    ("How many legs does a spider have?", "eight|8"),
    ("How many sides does a triangle have?", "three|3"),
    ("How many continents are there?", "seven|7"),
    ("What is 2 plus 2?", "4|four"),
    ("What is 10 minus 3?", "7|seven"),
    ("What is 5 times 5?", "25|twenty-five"),
    ("What is 100 divided by 10?", "10|ten"),
    ("Who wrote Hamlet?", "Shakespeare"),
    ("Who wrote Romeo and Juliet?", "Shakespeare"),
    ("Who painted the Mona Lisa?", "Vinci|Leonardo"),
    ("Who developed the theory of relativity?", "Einstein"),
    ("Who was the first president of the United States?", "Washington"),
    ("Who was the first man on the Moon?", "Armstrong"),
    ("Who discovered penicillin?", "Fleming"),
    ("Who invented the telephone?", "Bell"),
    ("What is the chemical symbol for gold?", "Au"),
    ("What is the chemical symbol for oxygen?", "O|O2"),
    ("What is the chemical formula of water?", "H2O|H₂O"),
    ("What gas do plants take in from the air?", "carbon dioxide|CO2"),
    ("What gas do we need to breathe?", "oxygen"),
    ("At how many degrees Celsius does water boil?", "100"),
    ("At how many degrees Celsius does water freeze?", "0|zero"),
    ("What do bees make?", "honey"),
    ("What is the largest ocean?", "Pacific"),
    ("What is the longest river in Africa?", "Nile"),
    ("What is the highest mountain in the world?", "Everest"),
    ("On which continent is Brazil?", "South America"),
    ("On which continent is Egypt?", "Africa"),
    ("What language is spoken in Portugal?", "Portuguese"),
    ("What is the opposite of hot?", "cold"),
    ("What is the plural of mouse?", "mice"),
    ("What colour do blue and yellow make?", "green"),
)
"""Each with words of which a right answer has one."""


@torch.inference_mode()
def answers(base: BaseModel) -> list[str]:
    """What the model says to each question now, decoded greedily."""
    prompts = [tuple(base.template.prompt_ids(base.tokenizer, question)) for question, _ in QUESTIONS]
    rows = greedy_decode(base.model, prompts, ANSWER_TOKENS, base.template.end_id)
    return [str(base.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]


def right(given: Sequence[str]) -> int:
    """How many of the answers say what they should."""
    return sum(
        re.search(rf"(?<!\w)({words})(?!\w)", answer, re.IGNORECASE) is not None
        for answer, (_, words) in zip(given, QUESTIONS, strict=True)
    )
