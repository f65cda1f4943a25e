"""The recipe of loramem-tiny: ``python -m loramem.embedded.build``.

Three steps, each skipped when its result is already there, the training resumed from its last checkpoint:
a byte-level BPE tokenizer, the corpus as token ids, and one training run whose last sixth is made of long rows
with skipped positions (PoSE, arXiv 2309.10400), so that distances up to 16,384 are seen at the price of 2,048.
The batches of step s are a function of (seed, s) alone.
"""

import hashlib
import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from loramem.embedded.corpus import END, PAD, SPECIAL_TOKENS, Generator, StandardLibrary, is_held_out

log = logging.getLogger(__name__)

NAME = "loramem-tiny"
VOCABULARY = 4096
IGNORED = -100
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' }}{{ message['content'] }}<|end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, apart from library versions and the text itself."""

    steps: int = 3000
    seed: int = 20260530
    text_rows: int = 7
    """Rows of 256 tokens of source and topics in a step."""
    lookup_rows: int = 3
    explained_rows: int = 2
    row_tokens: int = 256
    long_row_tokens: int = 2048
    long_share: float = 1 / 6
    """The last share of the steps takes two long rows in place of the twelve short ones."""
    positions: int = 16384
    fact_rows: int = 32
    """Facts in a step, one a row, at the position where a write will put them."""
    fact_row_tokens: int = 56
    fact_slots: int = 1024
    fact_exposures: int = 12
    """How often a fact is seen before another takes its slot."""
    fact_weight: float = 0.5
    """Weight of the facts' mean loss beside the rows' mean loss."""
    muon_lr: float = 1e-2
    adamw_lr: float = 3e-3
    warmup_steps: int = 50

    def learning_rate_factor(self, step: int) -> float:
        """Linear warm-up, then linear decay to zero."""
        return min((step + 1) / self.warmup_steps, 1.0) * (1.0 - step / self.steps)

    def is_long(self, step: int) -> bool:
        return step >= self.steps * (1 - self.long_share)


def architecture() -> Qwen3Config:
    """Qwen3, 6 layers, width 256, tied embeddings: 5,476,352 parameters."""
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        eos_token_id=SPECIAL_TOKENS.index(END),
        bos_token_id=None,
    )


def train_tokenizer(library: StandardLibrary) -> Tokenizer:
    """Byte-level BPE over the training documents; every digit is a token of its own; no normaliser."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for name, text in library.documents.items() if not is_held_out(name))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_documents(tokenizer: Tokenizer, library: StandardLibrary, *, held_out: bool) -> np.ndarray:
    """All documents of one side of the split as ids (uint16), an end token after each.

    The topics are prose and few, so the training side holds them three times.
    """
    end = SPECIAL_TOKENS.index(END)
    pieces: list[int] = []
    for name, text in library.documents.items():
        if is_held_out(name) == held_out:
            ids = [*tokenizer.encode(text).ids, end]
            pieces += ids * (3 if name.startswith("topic:") and not held_out else 1)
    return np.array(pieces, dtype=np.uint16)


class Batches:
    """The batches of every step."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, library: StandardLibrary, text: np.ndarray) -> None:
        self.recipe, self.tokenizer, self.text = recipe, tokenizer, text
        self.generator = Generator(library, recipe.seed)

    def text_row(self, step: int, row: int, length: int) -> tuple[list[int], list[int]]:
        start = self.generator.rng("text", step, row).randrange(len(self.text) - length)
        ids = self.text[start : start + length].tolist()
        return ids, ids

    def question_row(self, step: int, row: int, length: int, *, lookups: bool) -> tuple[list[int], list[int]]:
        rng = self.generator.rng("question", step, row)
        ids: list[int] = []
        labels: list[int] = []
        while len(ids) < length:
            for piece, supervised in self.generator.lookup(rng) if lookups else self.generator.explained(rng):
                encoded = self.tokenizer.encode(piece).ids
                ids += encoded
                labels += encoded if supervised else [IGNORED] * len(encoded)
        return ids[:length], labels[:length]

    def rows(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and labels (rows, tokens) of the step's text and questions."""
        recipe = self.recipe
        if recipe.is_long(step):
            length = recipe.long_row_tokens
            rows = [
                self.text_row(step, 0, length),
                self.question_row(step, 1, length, lookups=True)
                if step % 3
                else self.question_row(step, 1, length, lookups=False),
            ]
        else:
            length = recipe.row_tokens
            rows = [self.text_row(step, row, length) for row in range(recipe.text_rows)]
            rows += [self.question_row(step, row, length, lookups=True) for row in range(recipe.lookup_rows)]
            rows += [
                self.question_row(step, recipe.lookup_rows + row, length, lookups=False)
                for row in range(recipe.explained_rows)
            ]
        ids, labels = zip(*rows, strict=True)
        return torch.tensor(ids), torch.tensor(labels)

    def positions(self, step: int) -> torch.Tensor:
        """Position ids (2, tokens) of long rows: each jumps once, by up to what is left of the position range."""
        recipe, rng = self.recipe, self.generator.rng("positions", step)
        positions = torch.arange(recipe.long_row_tokens).repeat(2, 1)
        for row in positions:
            row[rng.randrange(recipe.long_row_tokens) :] += rng.randrange(recipe.positions - recipe.long_row_tokens)
        return positions

    def facts(self, step: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Ids and labels (facts, tokens) of the step's facts, and how often each was seen before."""
        recipe = self.recipe
        steps_per_epoch = recipe.fact_slots // recipe.fact_rows
        epoch, part = divmod(step, steps_per_epoch)
        order = list(range(recipe.fact_slots))
        self.generator.rng("slots", epoch).shuffle(order)
        ids = torch.full((recipe.fact_rows, recipe.fact_row_tokens), SPECIAL_TOKENS.index(PAD))
        labels = torch.full_like(ids, IGNORED)
        ages = []
        for row, slot in enumerate(order[part * recipe.fact_rows : (part + 1) * recipe.fact_rows]):
            # Slots are staggered so that at any step facts of every age are in the table.
            generation, age = divmod(epoch + slot * recipe.fact_exposures // recipe.fact_slots, recipe.fact_exposures)
            prompt, completion = self.generator.fact(slot, generation)
            prompt_ids, answer_ids = self.tokenizer.encode(prompt).ids, self.tokenizer.encode(completion).ids
            sequence = torch.tensor(prompt_ids + answer_ids)[: recipe.fact_row_tokens]
            ids[row, : len(sequence)] = sequence
            labels[row, len(prompt_ids) : len(sequence)] = sequence[len(prompt_ids) :]
            ages.append(age)
        return ids, labels, ages


def token_losses(
    model: Qwen3ForCausalLM, ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy (rows, tokens - 1) in nats of every label given what precedes it; 0 where ignored."""
    mask = None if positions is None else torch.ones_like(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1])
    flat = cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=IGNORED)
    return flat.view(ids.shape[0], -1)


def mean_of_supervised(losses: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return losses.sum() / (labels[:, 1:] != IGNORED).sum().clamp(min=1)


class Training:
    """The model, its two optimisers and the step they have reached."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.step = recipe, 0
        self.model = Qwen3ForCausalLM(architecture())
        matrices = [p for name, p in self.model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
        others = [p for name, p in self.model.named_parameters() if p.ndim != 2 or "embed_tokens" in name]
        self.optimizers = [
            # torch's Muon decays weights by 0.1 unless told otherwise.
            torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=recipe.adamw_lr, weight_decay=0.0),
        ]

    def update(self) -> None:
        """One optimiser step at the step's learning rate."""
        factor = self.recipe.learning_rate_factor(self.step)
        for optimizer, rate in zip(self.optimizers, (self.recipe.muon_lr, self.recipe.adamw_lr), strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1

    def save(self, path: Path) -> None:
        """Checkpoint as safetensors: weights, optimiser tensors, the step."""
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{index}.{name}": value for name, value in state.items()}
        temporary = path.with_suffix(".partial")
        save_file(tensors, temporary, metadata={"step": str(self.step), "recipe": json.dumps(asdict(self.recipe))})
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of the same recipe."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        if json.loads(metadata["recipe"]) != asdict(self.recipe):
            raise click.ClickException(f"{path} was made with another recipe; use another --work folder.")
        tensors = load_file(path)
        parameters = dict(self.model.named_parameters())
        states: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in self.optimizers]
        for name, value in tensors.items():
            kind, rest = name.split(".", 1)
            if kind == "model":
                parameters[rest].data.copy_(value)
            else:
                number, index, entry = rest.split(".", 2)
                states[int(number)].setdefault(int(index), {})[entry] = value
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        self.step = int(metadata["step"])


def train(training: Training, batches: Batches, work: Path, *, compiled: bool, checkpoint_steps: int = 100) -> None:
    """Run to the end of the recipe, with a checkpoint and a line of ``log.jsonl`` every so many steps."""
    recipe, checkpoint = training.recipe, work / "checkpoint.safetensors"
    if checkpoint.exists():
        training.load(checkpoint)
        log.info("resumed at step %d", training.step)
    losses_of: Any = torch.compile(token_losses) if compiled else token_losses
    sums, started = np.zeros(2), time.monotonic()
    by_age: dict[int, list[float]] = {}
    while training.step < recipe.steps:
        step = training.step
        ids, labels = batches.rows(step)
        if recipe.is_long(step):
            losses = token_losses(training.model, ids, labels, batches.positions(step))
        else:
            losses = losses_of(training.model, ids, labels)
        row_loss = mean_of_supervised(losses, labels)
        row_loss.backward()
        ids, labels, ages = batches.facts(step)
        losses = losses_of(training.model, ids, labels)
        fact_loss = mean_of_supervised(losses, labels)
        (recipe.fact_weight * fact_loss).backward()
        training.update()

        sums += row_loss.item(), fact_loss.item()
        per_fact = losses.detach().sum(1) / (labels[:, 1:] != IGNORED).sum(1).clamp(min=1)
        for age, loss in zip(ages, per_fact.tolist(), strict=True):
            by_age.setdefault(age // 3 * 3, []).append(loss)
        if training.step % checkpoint_steps == 0:
            training.save(checkpoint)
            line = {
                "step": training.step,
                "row_loss": round(float(sums[0]) / checkpoint_steps, 4),
                "fact_loss": round(float(sums[1]) / checkpoint_steps, 4),
                "fact_loss_by_exposures": {age: round(float(np.mean(of)), 3) for age, of in sorted(by_age.items())},
                "elapsed_s": round(time.monotonic() - started, 1),
            }
            with (work / "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            log.info("%s", line)
            sums, started, by_age = np.zeros(2), time.monotonic(), {}


@torch.inference_mode()
def held_out_loss(model: Qwen3ForCausalLM, text: np.ndarray, row_tokens: int, rows: int) -> float:
    """Mean cross-entropy in nats per token over evenly spaced windows of held-out text."""
    starts = np.linspace(0, len(text) - row_tokens, rows).astype(int)
    total = 0.0
    for start in starts:
        ids = torch.from_numpy(text[start : start + row_tokens].astype(np.int64))[None]
        total += mean_of_supervised(token_losses(model, ids, ids), ids).item()
    return total / rows


def export(training: Training, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the model as bf16 safetensors with tokenizer and chat template, as transformers loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    model = training.model.bfloat16()
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=SPECIAL_TOKENS.index(END), pad_token_id=SPECIAL_TOKENS.index(PAD)
    )
    model.save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in (END, PAD)],
        clean_up_tokenization_spaces=False,
        model_max_length=16384,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/loramem-tiny"), show_default=True)
@click.option("--steps", default=Recipe.steps, show_default=True, help="Length of the run and of its decay.")
@click.option("--threads", default=2, show_default=True)
@click.option("--compile/--no-compile", "compiled", default=False, help="torch.compile: a fifth faster; needs g++.")
def main(work: Path, steps: int, threads: int, compiled: bool) -> None:
    """Build loramem-tiny into WORK/loramem-tiny; interrupted runs resume."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    library, recipe = StandardLibrary(), Recipe(steps=steps)
    tokenizer_path = work / "tokenizer.json"
    if not tokenizer_path.exists():
        train_tokenizer(library).save(str(tokenizer_path))
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    for side in ("train", "held_out"):
        if not (work / f"{side}.npy").exists():
            np.save(work / f"{side}.npy", encode_documents(tokenizer, library, held_out=side == "held_out"))
    text, held_out = np.load(work / "train.npy"), np.load(work / "held_out.npy")
    log.info("%d training tokens, %d held out", len(text), len(held_out))

    training = Training(recipe)
    train(training, Batches(recipe, tokenizer, library, text), work, compiled=compiled)
    folder = work / NAME
    export(training, tokenizer, folder)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    facts = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens_of_text": len(text),
        "corpus_sha256": library.digest(),
        "held_out_nats_per_token": {
            str(tokens): round(held_out_loss(model, held_out, tokens, rows), 4)
            for tokens, rows in ((256, 400), (2048, 50), (16384, 4))
        },
        "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())},
    }
    (work / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    log.info("%s", facts)


if __name__ == "__main__":
    main()
