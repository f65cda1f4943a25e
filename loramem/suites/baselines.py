"""The obvious way to write records into a LoRA: PEFT under the Trainer of transformers, in two set-ups.

It is given every doubt: looking whether it is done is not counted as its time, it stops at the first epoch after
which every record is exact, and `loramem.suites.write_speed` tunes its learning rate and batch.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from loramem.models.adapters import ALPHA_PER_RANK
from loramem.models.base_model import BaseModel
from loramem.models.placement import Placement
from loramem.records.prompts import EncodedRecord
from loramem.suites.timing import all_exact, clock, count_exact, teacher_forced

KL_WEIGHT = 1.0
"""Of the divergence from the base beside the loss of the records, both in nats per token."""
IGNORED = -100  # the label of positions that carry no loss, transformers' convention
MANY_EPOCHS = 100_000


def same_placement(base: BaseModel, rank: int) -> LoraConfig:
    """Our placement, scaling and rank, so that only the training differs."""
    placement = Placement.default(base.model)
    return LoraConfig(
        r=rank,
        lora_alpha=ALPHA_PER_RANK * rank,
        target_modules=list(placement.modules),
        layers_to_transform=list(placement.layers),
        task_type="CAUSAL_LM",
    )


def all_linear() -> LoraConfig:
    """LoRA as it is usually set up: every linear module of every layer, rank 16, alpha 32, dropout 0.05."""
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")


def trainer_loop(
    base: BaseModel,
    records: Sequence[EncodedRecord],
    config: LoraConfig,
    *,
    learning_rate: float,
    batch_records: int,
    seed: int,
    cap_s: float,
    bfloat16: bool = False,
    neutral: Sequence[EncodedRecord] = (),
    then: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train one LoRA with `transformers.Trainer` until every record is decoded exactly.

    Cross-entropy on answer and end token, AdamW at a constant rate (a decaying one needs the number of epochs, which
    nobody knows beforehand), no weight decay. The base is left as it was.

    Args:
        cap_s: Training seconds after which it is stopped and scored as it is. Decoding after each epoch is not counted.
        bfloat16: Autocast of the matrix products, as the writer has it where the processor multiplies it natively.
        neutral: Each step also draws the adapter to the base at the answers of as many of these, by KL(base ‖ adapted).
        then: Called while the trained adapter is still attached to the base.

    Returns:
        JSON-able: seconds, eval_s, steps, epochs, exact, records, parameters, min_prob, loss, capped, and the settings.
    """
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=batch_records,
            num_train_epochs=MANY_EPOCHS,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            seed=seed,
            use_cpu=base.device.type == "cpu",
            bf16=bfloat16,
            dataloader_pin_memory=base.device.type == "cuda",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        torch.manual_seed(seed)
        model = get_peft_model(base.model, config)
        watch = _UntilExact(base, records, cap_s)
        trainer = _Loop(
            neutral=_batches(base, neutral, batch_records) if neutral else None,
            model=model,
            args=arguments,
            train_dataset=[_labelled(record) for record in records],
            data_collator=_collator(base),
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)  # it prints to stdout
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        try:
            trainer.train()
            model.eval()
            min_prob, loss = teacher_forced(base, records)
            then()
        finally:
            model.unload()
    return {
        "seconds": round(watch.seconds, 3),
        "eval_s": round(watch.eval_s, 3),
        "steps": trainer.state.global_step,
        "epochs": watch.epochs,
        "exact": watch.exact,
        "records": len(records),
        "parameters": parameters,
        "min_prob": min_prob,
        "loss": loss,
        "capped": watch.exact < len(records),
        "cap_s": round(cap_s, 3),
        "learning_rate": learning_rate,
        "batch": batch_records,
        "bfloat16": bfloat16,
        "rank": config.r,
    }


class _Loop(Trainer):
    """The Trainer; with neutral material its loss has a term that draws the adapter to the base there."""

    def __init__(self, *args: Any, neutral: Iterator[dict[str, Tensor]] | None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.neutral = neutral

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **options)
        if self.neutral is None:
            return loss
        batch = next(self.neutral)
        at = batch.pop("labels")[:, 1:] != IGNORED
        adapted: PeftModel = self.accelerator.unwrap_model(model)
        with torch.no_grad(), adapted.disable_adapter():
            base = model(**batch).logits[:, :-1][at].log_softmax(-1)
        mine = model(**batch).logits[:, :-1][at].log_softmax(-1)
        return loss + KL_WEIGHT * (base.exp() * (base - mine)).sum(-1).mean()


def _batches(base: BaseModel, neutral: Sequence[EncodedRecord], size: int) -> Iterator[dict[str, Tensor]]:
    """Neutral material again and again, so many at a time."""
    collate, rows = _collator(base), [_labelled(record) for record in neutral]
    for start in cycle(range(0, len(rows), size)):
        batch = collate(rows[start : start + size])
        yield {name: tensor.to(base.device) for name, tensor in batch.items()}


class _UntilExact(TrainerCallback):
    """Stops the Trainer at the first epoch after which every record is exact, or at the cap."""

    def __init__(self, base: BaseModel, records: Sequence[EncodedRecord], cap_s: float) -> None:
        self.base, self.records, self.cap_s = base, records, cap_s
        self.exact = self.epochs = 0
        self.seconds = self.eval_s = 0.0

    def trained_s(self) -> float:
        return clock(self.base.device) - self.started - self.eval_s

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = clock(self.base.device)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.trained_s() >= self.cap_s:
            control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds = self.trained_s()
        self.epochs += 1
        capped = self.seconds >= self.cap_s
        self.base.model.eval()  # the Trainer switches back before its next step
        if all_exact(self.base, self.records):
            self.exact = len(self.records)
        elif capped:
            self.exact = count_exact(self.base, self.records)
        self.eval_s += self.trained_s() - self.seconds
        control.should_training_stop = capped or self.exact == len(self.records)


def _labelled(record: EncodedRecord) -> dict[str, list[int]]:
    ids = [*record.prompt_ids, *record.answer_ids]
    labels = [IGNORED] * len(record.prompt_ids) + list(record.answer_ids)
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _collator(base: BaseModel) -> DataCollatorForSeq2Seq:
    """Padding on the right to the longest of the batch, by the library's own collator."""
    base.tokenizer.padding_side = "right"
    if base.tokenizer.pad_token is None:
        base.tokenizer.pad_token = base.tokenizer.eos_token
    return DataCollatorForSeq2Seq(base.tokenizer, label_pad_token_id=IGNORED)
