"""The frozen base model: load, freeze."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from loramem import embedded
from loramem._util.out_of_memory import memory_errors
from loramem.errors import UnsupportedBaseModel
from loramem.models.architecture import check_architecture
from loramem.models.dtypes import Dtype, DtypeChoice
from loramem.models.find_base import find_base_model, is_gguf, lacking_files, location_of
from loramem.models.fingerprint import Fingerprint, fingerprint
from loramem.models.gguf_file import check_gguf, read_gguf
from loramem.models.model_files import check_files
from loramem.models.parameters import parameters_sha256
from loramem.models.pretrained import (
    check_computes,
    context_tokens,
    read_config,
    read_model,
    read_tokenizer,
    vocabulary_size,
)
from loramem.models.rounded_inputs import round_inputs, round_weights
from loramem.models.unreachable import unreachable_tokens
from loramem.records.prompts import PromptTemplate

DTYPES: Mapping[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "q8_0": torch.float32,
}


@dataclass
class BaseModel:
    """A loaded base model: frozen, in evaluation mode, with all that a store must remember about it."""

    id: str
    """Hub id, "loramem-tiny", or a local folder's last name: what adapters are saved with. Never a path."""
    revision: str | None
    """Commit of the Hub repository; None for local folders."""
    location: str
    """What `load_base_model` finds it by, here: a folder if it was given by one, otherwise its id."""
    folder: Path
    """Or a GGUF file."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate
    unreachable: frozenset[int]
    """Token ids that can never be decoded greedily; see `unreachable_tokens`."""
    vocabulary: int
    """Rows of the embedding and the unembedding: token ids from here on cannot be computed."""
    fingerprint: Fingerprint
    device: torch.device
    dtype: Dtype
    rounds_inputs: bool = False
    """Whether it was dequantised from a file that llama.cpp computes with inputs of eight bits; here they are rounded
    in "q8_0" alone."""

    def check(self, stored: Mapping[str, str], dtype: str) -> None:
        """Compare with the fingerprint that a store was written with, and in which dtype.

        Raises:
            OtherBaseModel: Names every part that differs.
        """
        self.fingerprint.check(stored, self.folder, self.id, same_dtype=dtype == self.dtype)

    def known_as(self, id: str, revision: str | None) -> "BaseModel":
        """The same model under the name that a store gives it, which its adapters are saved with."""
        if (id, revision) == (self.id, self.revision):
            return self
        return replace(self, id=id, revision=revision, location=str(self.folder.resolve()))

    @property
    def max_tokens(self) -> int:
        """Context length in tokens."""
        return context_tokens(self.model.config, self.tokenizer.model_max_length)


def load_base_model(
    name: str = embedded.NAME,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: DtypeChoice = "auto",
    rehash: bool = False,
) -> BaseModel:
    """Load a causal language model and freeze it.

    Args:
        name: "loramem-tiny", a local folder, a GGUF file (which is dequantised), or a Hub id (downloaded once,
            safetensors only).
        revision: Hub branch, tag or commit; resolved to a commit.
        device: "auto" takes CUDA where there is one; otherwise a torch device.
        dtype: "float32", "bfloat16", "float16"; "auto" is float32 on CPU, bfloat16 on CUDA; "q8_0" computes as
            llama.cpp does on a Q8_0 file of it, or on this file if it is a quantised one.
        rehash: Hash the weights again even if the cache knows these files.

    Raises:
        BaseModelNotFound: Nothing there, no network, no safetensors, or files that are damaged.
        UnsupportedBaseModel: Weights that are not all there or belong to another configuration, code of its own,
            quantised weights, a tokenizer without a usable end token, or a device or dtype that cannot be used.
        OutOfMemory: It does not fit into the device's memory.
    """
    target = _device(device)
    if dtype == "auto":
        dtype = "bfloat16" if target.type == "cuda" else "float32"
    check_dtype(dtype)
    folder, identity, commit = find_base_model(name, revision)
    lacking = lacking_files(name, commit)
    values = check_gguf(folder, name) if is_gguf(folder) else check_files(folder, name, lacking)
    with memory_errors():
        config = read_config(folder, name)
        model = read_model(folder, config, DTYPES[dtype], name, values)
        tokenizer = read_tokenizer(folder, name, lacking)
        context_tokens(model.config, tokenizer.model_max_length)
        parameters = parameters_sha256(model)  # before anything is done with it
        model.to(target)  # type: ignore[arg-type]  # transformers wraps nn.Module.to
        model.eval().requires_grad_(False)
        # Published generation settings sample, or penalise repetition; generate() would mix them into ours.
        model.generation_config = GenerationConfig()
        vocabulary, unreachable = vocabulary_size(model, name), unreachable_tokens(model)
        template = PromptTemplate.of(tokenizer, unreachable, vocabulary)
        check_computes(model, template, name)
        check_architecture(model)
        quantised = is_gguf(folder) and read_gguf(folder, name).is_quantised
        if dtype == "q8_0":
            if not quantised:
                round_weights(model)
            round_inputs(model)
    return BaseModel(
        id=identity,
        revision=commit,
        location=location_of(name) or identity,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        template=template,
        unreachable=unreachable,
        vocabulary=vocabulary,
        fingerprint=replace(fingerprint(folder, rehash=rehash), parameters=parameters),
        device=target,
        dtype=dtype,
        rounds_inputs=quantised,
    )


def load_tokenizer(name: str, revision: str | None, stored: Mapping[str, str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model whose files have the fingerprint that a store was written with.

    Args:
        name, revision: As of `load_base_model`.
        stored: The store's fingerprint.

    Raises:
        OtherBaseModel: Names every part that differs.
        BaseModelNotFound, UnsupportedBaseModel: As `load_base_model`.
    """
    folder, identity, commit = find_base_model(name, revision)
    fingerprint(folder).check(stored, folder, identity, same_dtype=False)
    return read_tokenizer(folder, name, lacking_files(name, commit))


def check_dtype(name: str) -> None:
    """Refuse the name of a dtype that base models are not loaded in.

    Raises:
        UnsupportedBaseModel: There is no such dtype here.
    """
    if name not in DTYPES:
        raise UnsupportedBaseModel(f"Unknown dtype {name!r}. Use one of {', '.join(DTYPES)} or auto.")


def _device(name: str) -> torch.device:
    """The torch device of a name, checked by putting something there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedBaseModel(f"Device {name!r} cannot be used here ({reason}). Use auto or cpu.") from None
