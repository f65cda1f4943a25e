"""What transformers makes of a base model's folder: configuration, model and tokenizer, or the reason why not.

No other module reads a base model with transformers. Code that a folder brings is never run, nothing is downloaded, and
whatever the library raises while it interprets files comes out as an error of ours with its cause.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers.models import BPE
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import modeling_gguf_pytorch_utils as gguf_loader
from transformers.utils import logging as logging_of_transformers

from loramem._util.out_of_memory import is_out_of_memory
from loramem.errors import BaseModelNotFound, LoramemError, UnsupportedBaseModel, is_failure, reason
from loramem.models.find_base import is_gguf
from loramem.models.gguf_file import check_tensors, complete, split_as_said
from loramem.models.model_files import has_vocabulary
from loramem.models.whole_model import check_size, check_whole
from loramem.records.prompts import PromptTemplate

CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "n_ctx")
"""What architectures call their context length, in the order of preference: BLOOM seq_length, MPT max_seq_len…"""
TRIAL_TOKENS = 8
"""Of the pass by which a model is tried: enough to fail, few enough to cost nothing."""
LONGEST = 10**9
"""Tokenizers that know no limit say 10^30."""


def read_config(folder: Path, name: str) -> PreTrainedConfig:
    """A base model's configuration, by the class that transformers has for it.

    Args:
        folder: Or a GGUF file, here and below.

    Raises:
        BaseModelNotFound: It cannot be read.
        UnsupportedBaseModel: It needs code that the folder brings, or is quantised.
    """
    with _reading("The configuration", name):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            **_place(folder), trust_remote_code=False, local_files_only=True
        )
        if is_gguf(folder):
            config = complete(config, folder, name)
        described = config.to_dict()
    if described.get("quantization_config") is not None:
        raise UnsupportedBaseModel(
            f"{name!r} is quantised. Its kernels do not give the same logits in every batch shape, so recall "
            "could not be certified; use the unquantised model."
        )
    return config


def read_model(folder: Path, config: PreTrainedConfig, dtype: torch.dtype, name: str, values: int) -> PreTrainedModel:
    """The model on the CPU, with every tensor from its files.

    Args:
        values: That the weight files hold, taken together.

    Raises:
        BaseModelNotFound: It cannot be read.
        UnsupportedBaseModel: It needs code that the folder brings, or not all of it is in the files.
    """
    with _reading("The model", name):
        with torch.device("meta"):
            described = AutoModelForCausalLM.from_config(deepcopy(config), trust_remote_code=False)
        check_size(values, described, name)
        if is_gguf(folder):
            check_tensors(folder, described, name)
        dequantised: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True)} if is_gguf(folder) else {}
        with _quiet():
            # Shapes that differ would end in an error that does not name them; `check_whole` refuses them by name.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **_place(folder),
                **dequantised,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                generation_config=GenerationConfig(),  # of the folder's nothing is used
            )
    model: PreTrainedModel = loaded[0]
    check_whole(model, loaded[1], name)
    return model


def read_tokenizer(folder: Path, name: str, lacking: str) -> PreTrainedTokenizerBase:
    """The tokenizer, which gives the same text the same ids every time.

    Args:
        lacking: What to do where its files are not there.

    Raises:
        BaseModelNotFound: It cannot be read, or has no vocabulary.
        UnsupportedBaseModel: It needs code that the folder brings, or draws at random.
    """
    # transformers makes an empty tokenizer of some classes where there are no files, with an unknown token at most.
    absent = BaseModelNotFound(f"{name!r} has no vocabulary of a tokenizer (tokenizer.json). {lacking}")
    with _reading("The tokenizer", name, absent if not is_gguf(folder) and not has_vocabulary(folder) else None):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            **_place(folder), trust_remote_code=False, local_files_only=True
        )
        if is_gguf(folder):
            tokenizer = split_as_said(tokenizer, folder, name)
        known = len(tokenizer) - len(tokenizer.added_tokens_decoder)
        rules = tokenizer.backend_tokenizer.model if tokenizer.is_fast else None
    if known <= 1:
        raise absent
    if not isinstance(tokenizer.model_max_length, int | float):
        raise BaseModelNotFound(
            f"model_max_length in tokenizer_config.json of {name!r} is no number: {tokenizer.model_max_length!r}."
        )
    if isinstance(rules, BPE) and rules.dropout:
        raise UnsupportedBaseModel(
            f"The tokenizer of {name!r} drops merges at random (dropout {rules.dropout:g}), so that a text has other "
            "tokens every time. Set model.dropout to null in its tokenizer.json."
        )
    return tokenizer


def _place(folder: Path) -> dict[str, Any]:
    """How transformers is told where a base model is: a folder, or a GGUF file in one."""
    if is_gguf(folder):
        return {"pretrained_model_name_or_path": folder.resolve().parent, "gguf_file": folder.resolve().name}
    return {"pretrained_model_name_or_path": folder}


def context_tokens(config: PreTrainedConfig, tokenizer_limit: object = None) -> int:
    """Context length in tokens.

    Args:
        tokenizer_limit: ``model_max_length`` of the tokenizer, for configurations that say none.

    Raises:
        UnsupportedBaseModel: Neither says one.
    """
    described: dict[str, Any] = config.get_text_config().to_dict()
    found = [described[name] for name in CONTEXTS if described.get(name) is not None] + [tokenizer_limit]
    if type(found[0]) is not int or not 0 < found[0] < LONGEST:
        raise UnsupportedBaseModel(
            f"The base model does not say how many tokens its context has (found {found[0]!r}). Set "
            "max_position_embeddings in its config.json, or model_max_length in its tokenizer_config.json."
        )
    return found[0]


def vocabulary_size(model: PreTrainedModel, name: str) -> int:
    """Token ids that both ends of a model have a row for.

    Raises:
        UnsupportedBaseModel: It has no unembedding.
    """
    head: nn.Module | None = model.get_output_embeddings()
    if head is None:
        raise UnsupportedBaseModel(f"{name!r} has no unembedding, so that it predicts no tokens.")
    rows = [parameter.shape[0] for end in (model.get_input_embeddings(), head) for parameter in end.parameters()]
    return min(rows)


@torch.inference_mode()
def check_computes(model: PreTrainedModel, template: PromptTemplate, name: str) -> None:
    """One pass over a few tokens of the prompt: a configuration may load and be no model all the same.

    Raises:
        UnsupportedBaseModel: It cannot be computed, or gives no finite logits.
    """
    ids = torch.tensor(
        [[template.end_id, *template.prefix_ids, *template.suffix_ids][:TRIAL_TOKENS]], device=model.device
    )
    with _reading("The model", name):
        logits = model(input_ids=ids, use_cache=False).logits
    if not bool(torch.isfinite(logits).all()):
        raise UnsupportedBaseModel(
            f"{name!r} gives logits that are not finite in {model.dtype}. Its weights are damaged, or this dtype is "
            "too narrow for it: try dtype float32 or bfloat16, or get the weights again."
        )


@contextmanager
def _reading(what: str, name: str, cause: BaseModelNotFound | None = None) -> Iterator[None]:
    """What transformers raises while it interprets a folder, as an error of ours that names the folder and the cause.

    It raises whatever its parsers meet in files of the wrong content, so that no list of classes is complete. Nothing
    but calls of it belongs into this context.

    Args:
        cause: What a failure can only mean, where that is known.
    """
    try:
        yield
    except LoramemError:
        raise
    except BaseException as error:
        if is_out_of_memory(error) or not is_failure(error):
            raise
        if "trust_remote_code" in str(error):
            raise UnsupportedBaseModel(
                f"{what} of {name!r} needs Python code that the folder names (auto_map). loramem never runs code of a "
                "model; use one that transformers knows by itself."
            ) from error
        raise cause or BaseModelNotFound(f"{what} of {name!r} cannot be loaded: {reason(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers draws a bar for reading weights from disk, and a table of what it missed; downloads keep theirs."""
    shown = logging_of_transformers.is_progress_bar_enabled()
    logging_of_transformers.disable_progress_bar()
    loader = logging.getLogger("transformers.modeling_utils")
    loader.addFilter(_is_no_report)
    names = vars(gguf_loader)
    bar = names["tqdm"]
    names["tqdm"] = partial(bar, disable=True)  # it asks for none of the above
    try:
        yield
    finally:
        names["tqdm"] = bar
        loader.removeFilter(_is_no_report)
        if shown:
            logging_of_transformers.enable_progress_bar()


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()  # `check_whole` says what matters of it
