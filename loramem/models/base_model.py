"""The frozen base model: find, load, freeze."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is of the HTTP library it uses
    HTTPError,
    LocalEntryNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from loramem import embedded
from loramem._util.out_of_memory import memory_errors
from loramem.errors import BaseModelNotFound, UnsupportedBaseModel, reason
from loramem.models.architecture import check_architecture
from loramem.models.dtypes import Dtype, DtypeChoice
from loramem.models.fingerprint import Fingerprint, fingerprint
from loramem.models.gguf_file import check_gguf, is_gguf, read_gguf
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
from loramem.models.unreachable import unreachable_tokens
from loramem.records.prompts import PromptTemplate

# Everything a causal LM needs and nothing that could run code: no pickles, no Python files.
HUB_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt")
SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{40})$")
"""End of the path of a repository's commit in the Hub's cache."""
# The same weights once more in another vendor's layout, and folders of other formats: a pattern's * crosses "/".
HUB_IGNORED = ("consolidated*", "*/*")
DTYPES: Mapping[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    """Whether it was dequantised from a file that llama.cpp computes with inputs of eight bits."""

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
        dtype: "float32", "bfloat16", "float16"; "auto" is float32 on CPU, bfloat16 on CUDA.
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
    lacking = _lacking(name, commit)
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
        rounds_inputs=is_gguf(folder) and read_gguf(folder, name).is_quantised,
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
    return read_tokenizer(folder, name, _lacking(name, commit))


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


def location_of(name: str) -> str | None:
    """The folder or GGUF file that a name is the path of; None if it is "loramem-tiny" or can only be a Hub id."""
    local = _expanded(name)
    return str(local.resolve()) if name != embedded.NAME and (local.is_dir() or is_gguf(local)) else None


def find_base_model(name: str, revision: str | None = None) -> tuple[Path, str, str | None]:
    """Folder or GGUF file, public identity and commit of a base model named by Hub id, place or "loramem-tiny".

    Raises:
        BaseModelNotFound: No such folder, and the Hub does not give it.
    """
    if name == embedded.NAME:
        return embedded.base_path(), name, None
    if (location := location_of(name)) is not None:
        if match := SNAPSHOT.search(location):
            return Path(location), match[1].replace("--", "/"), match[2]
        return _expanded(name), Path(location).name, None
    try:
        folder = Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(HUB_PATTERNS), ignore_patterns=list(HUB_IGNORED)
            )
        )
    # The client lets through errors of its HTTP library, RuntimeError of downloads, what nonsense does to its parsers.
    except (HTTPError, OSError, ValueError, RuntimeError, KeyError) as error:
        if isinstance(error, LocalEntryNotFoundError) and _is_cached(name):  # offline, and a file is lacking
            raise BaseModelNotFound(_incomplete(name, revision)) from error
        raise BaseModelNotFound(
            f"Base model {name!r} is neither a local folder nor available from the Hub ({reason(error)})."
        ) from error
    return folder, name, folder.name


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~someone who is not a user here
        return Path(name)


def _is_cached(name: str) -> bool:
    """Whether some revision of a Hub repository was downloaded, in whole or in part."""
    cached = Path(huggingface_hub.constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"))
    return next(cached.glob("snapshots/*/*"), None) is not None


def _lacking(name: str, commit: str | None) -> str:
    """What to do about a file that a model's folder does not have."""
    if commit is not None and huggingface_hub.is_offline_mode():  # otherwise it was completed just now
        return _incomplete(name, commit)
    return "Give a folder with all of a model, its weights as safetensors: loramem never loads pickled ones."


def _incomplete(name: str, revision: str | None) -> str:
    where = f" at revision {revision}" if revision else ""
    return (
        f"The cached copy of {name}{where} is incomplete: go online once (HF_HUB_OFFLINE unset) and load it, which "
        "completes it."
    )
