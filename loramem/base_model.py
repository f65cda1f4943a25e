"""The frozen base model: find, load, freeze."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as logging_of_transformers

from loramem import embedded
from loramem.errors import BaseModelNotFound, UnsupportedBaseModel
from loramem.fingerprint import Fingerprint, fingerprint
from loramem.parameters import parameters_sha256
from loramem.prompts import PromptTemplate

# Everything a causal LM needs and nothing that could run code: no pickles, no Python files.
HUB_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt")
SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{40})$")
"""End of the path of a repository's commit in the Hub's cache."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate
    unreachable: frozenset[int]
    """Token ids that can never be decoded greedily; see `unreachable_tokens`."""
    fingerprint: Fingerprint
    device: torch.device
    dtype: str

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
        return int(self.model.config.get_text_config().max_position_embeddings)


def load_base_model(
    name: str = embedded.NAME,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    rehash: bool = False,
) -> BaseModel:
    """Load a causal language model and freeze it.

    Args:
        name: "loramem-tiny", a local folder, or a Hub id (downloaded once, safetensors only).
        revision: Hub branch, tag or commit; resolved to a commit.
        device: "auto" takes CUDA where there is one; otherwise a torch device.
        dtype: "float32", "bfloat16", "float16"; "auto" is float32 on CPU, bfloat16 on CUDA.
        rehash: Hash the weights again even if the cache knows these files.

    Raises:
        BaseModelNotFound: Nothing there, no network, or no safetensors.
        UnsupportedBaseModel: Quantised weights, no usable end token, or a device or dtype that cannot be used.
    """
    target = _device(device)
    if dtype == "auto":
        dtype = "bfloat16" if target.type == "cuda" else "float32"
    if dtype not in DTYPES:
        raise UnsupportedBaseModel(f"Unknown dtype {dtype!r}. Use one of {', '.join(DTYPES)} or auto.")
    folder, identity, commit = find_base_model(name, revision)
    if not sorted(folder.glob("*.safetensors")):
        raise BaseModelNotFound(
            f"{name!r} has no *.safetensors weights. loramem never loads pickled weights; convert the model first."
        )
    try:
        config = AutoConfig.from_pretrained(folder)
        if "quantization_config" in config.to_dict():
            raise UnsupportedBaseModel(
                f"{name!r} is quantised. Its kernels do not give the same logits in every batch shape, so recall "
                "could not be certified; use the unquantised model."
            )
        with _no_progress_bar():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseModelNotFound(f"{name!r} cannot be loaded as a causal language model: {reason}") from error
    parameters = parameters_sha256(model)  # before anything is done with them
    model.to(target)  # type: ignore[arg-type]  # transformers wraps nn.Module.to
    model.eval().requires_grad_(False)
    # Published generation settings sample, or penalise repetition; generate() would mix them into ours.
    model.generation_config = GenerationConfig()
    unreachable = unreachable_tokens(model)
    return BaseModel(
        id=identity,
        revision=commit,
        location=location_of(name) or identity,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        template=PromptTemplate.of(tokenizer, unreachable),
        unreachable=unreachable,
        fingerprint=replace(fingerprint(folder, rehash=rehash), parameters=parameters),
        device=target,
        dtype=dtype,
    )


def _device(name: str) -> torch.device:
    """The torch device of a name, checked by putting something there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedBaseModel(f"Device {name!r} cannot be used here ({reason}). Use auto or cpu.") from None


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws a bar for reading weights from disk; downloads keep theirs."""
    shown = logging_of_transformers.is_progress_bar_enabled()
    logging_of_transformers.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging_of_transformers.enable_progress_bar()


@torch.inference_mode()
def unreachable_tokens(model: PreTrainedModel, tolerance: float = 0.005) -> frozenset[int]:
    """Ids whose row of the unembedding equals another token's: their logits are equal whatever the hidden state.

    Two equal logits cannot both exceed p = 0.5, so no adapter below the head can make such a token certain. Tokens
    that a base model never saw in training often share one row.

    Args:
        tolerance: Largest distance of two "equal" rows, as a share of their norm.
    """
    rows = model.get_output_embeddings().weight
    # Equal rows have equal projections, so that after sorting it is enough to compare neighbours.
    direction = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0)).to(rows)
    order = torch.sort(rows @ direction).indices
    first, second = rows[order[:-1]].float(), rows[order[1:]].float()
    equal = (first - second).norm(dim=1) <= tolerance * first.norm(dim=1)
    return frozenset(order[:-1][equal].tolist()) | frozenset(order[1:][equal].tolist())


def location_of(name: str) -> str | None:
    """The folder that a name is the path of; None if it is "loramem-tiny" or can only be a Hub id."""
    local = Path(name).expanduser()
    return str(local.resolve()) if name != embedded.NAME and local.is_dir() else None


def find_base_model(name: str, revision: str | None = None) -> tuple[Path, str, str | None]:
    """Folder, public identity and commit of a base model named by Hub id, local folder or "loramem-tiny".

    Raises:
        BaseModelNotFound: No such folder, and the Hub does not give it.
    """
    if name == embedded.NAME:
        return embedded.base_path(), name, None
    if (location := location_of(name)) is not None:
        if match := SNAPSHOT.search(location):
            return Path(location), match[1].replace("--", "/"), match[2]
        return Path(name).expanduser(), Path(location).name, None
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(HUB_PATTERNS)))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseModelNotFound(
            f"Base model {name!r} is neither a local folder nor available from the Hub ({reason})."
        ) from error
    return folder, name, folder.name
