"""A folder of adapters that a server takes as it is: base name, rank, dtype and format as that server wants them.

The function stays what was certified: padding a rank adds zero rows to A and zero columns to B and scales alpha with
it. A cast does not, which `loramem.store.certificates` measures. Neither keys nor values go along unless asked.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from loramem import embedded
from loramem._util.choices import check_choice
from loramem._util.files import beside, make_directory, rename_new, write_directory, write_synced
from loramem._util.layout import ADAPTERS
from loramem.errors import AdapterError, ArgumentError, IntegrityError, NotServable, StoreError
from loramem.index.rows import StoredAdapter, StoredRecord, hidden_names
from loramem.models.adapter_header import CONFIG, WEIGHTS, AdapterHeader, read_header
from loramem.models.base_model import DTYPES
from loramem.models.dtypes import DTYPES as FILE_DTYPES
from loramem.models.dtypes import Dtype
from loramem.results import DeployReport, Finding
from loramem.serving.check import chat_keys, check_headers, notes_of, server_of
from loramem.serving.guide import DIGESTS, KEYS, NOWHERE, Asking, Routing, guide
from loramem.serving.targets import BASE_TYPES, LLAMA_CPP, BaseType, Target
from loramem.store.manifest import Manifest
from loramem.store.session import Session

PROMPT, ROUTING, GUIDE = "prompt.json", "routing.jsonl", "README.md"
READABLE_FILE, READABLE_FOLDER = 0o644, 0o755
"""A server runs under a user of its own; what names keys stays private."""
BASE, BASE_FILE = "FOLDER_OF_THE_BASE_MODEL", "BASE_MODEL.gguf"
"""Where the adapters name a model that only this machine has: its folder is nobody else's business."""


@dataclass(frozen=True)
class Deployment:
    """What the server wants that the store has otherwise."""

    target: Target
    base_name: str | None = None
    """The model name or path that it is started with; None keeps what the adapters say."""
    pad_rank: int | None = None
    """One rank for all adapters, at least their largest; None keeps theirs."""
    dtype: Dtype = "float32"
    """Of the weights in the files."""
    include_keys: bool = False
    """Write `ROUTING`, which says which adapter answers which key."""
    hash_keys: bool = False
    """Write `ROUTING` with salted digests in place of keys: whoever knows a key finds its adapter."""
    base_type: BaseType | None = None
    """Of the base model, where it goes along (the embedded one, to llama.cpp); None goes by ``dtype``."""

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, FILE_DTYPES)
        if self.target == LLAMA_CPP and self.dtype == "bfloat16":
            raise ArgumentError(
                "llama.cpp's adapters are float32 or float16 here. Use --dtype float16.",
                argument="dtype",
                value="bfloat16",
            )
        if self.include_keys and self.hash_keys:
            raise ArgumentError(
                "A routing file holds keys or their digests, not both. Leave out --include-keys or --hash-keys.",
                argument="hash_keys",
                value=True,
            )
        if self.base_type is not None:
            check_choice("base_type", self.base_type, BASE_TYPES)


def deploy(session: Session, folder: Path, wanted: Deployment) -> DeployReport:
    """Write the adapters of a store to a new folder, one directory each, with a guide how to start the server.

    Raises:
        NotServable: The server would refuse the result, or serve something else; nothing is left of it.
        AdapterError: ``pad_rank`` is below the rank of an adapter.
        StoreError: There is something at ``folder``, it lies in a store's folder, or the store is empty.
        IntegrityError: An adapter's files are not what was committed.
    """
    manifest = session.manifest
    with session.index.snapshot():
        adapters, ended = list(session.index.adapters()), session.index.tombstones()
        records = list(session.index.records())
    if not adapters:
        raise StoreError(f"{session.store} holds no adapters. Write records first.")
    if wanted.include_keys and manifest.key_salt is not None:
        raise StoreError(f"{session.store} holds digests of its keys, not the keys. Use --hash-keys.")
    if wanted.include_keys or wanted.hash_keys:
        records = session.reader.compared(records)  # of older ones it is not known
    chat = chat_keys(manifest, records)
    server = server_of(session, wanted.target, None, wanted.base_name)
    with beside(folder, session.store) as partial:
        made = partial / "folder"
        as_peft = made if wanted.target != LLAMA_CPP else partial / "peft"
        make_directory(made)
        for adapter in adapters:
            config, tensors = _committed(session.store, adapter)
            config, tensors = _padded(adapter.id, config, tensors, wanted.pad_rank)
            if wanted.base_name is not None:
                config = {**config, "base_model_name_or_path": wanted.base_name}
            write_directory(as_peft / adapter.id, _files(adapter.id, config, tensors, wanted))
        headers = [read_header(as_peft / adapter.id) for adapter in adapters]
        found = _accepted(headers, check_headers(headers, server), wanted.target)
        found += notes_of(manifest, server, sum(ended.get(one.id, 0) for one in adapters), chat, rechecked=False)
        base_name = str(headers[0].config["base_model_name_or_path"])
        findable = wanted.base_name is not None or not server.base_is_local
        served_as = base_name if findable else BASE
        if wanted.target == LLAMA_CPP:
            served_as = _as_gguf(session, as_peft, made, headers, wanted)
        write_synced(
            made / PROMPT, (json.dumps(_prompt(manifest, base_name), indent=2, sort_keys=True) + "\n").encode()
        )
        if wanted.include_keys or wanted.hash_keys:
            salt = (manifest.key_salt or secrets.token_hex(16)) if wanted.hash_keys else None
            write_synced(made / ROUTING, "".join(_routes(session, records, salt)).encode())
        routing: Routing = KEYS if wanted.include_keys else DIGESTS if wanted.hash_keys else NOWHERE
        longest = max(record.answer_tokens for record in records) + 1
        text = guide(headers, server.target, served_as, Asking(manifest.prompt, longest, chat, routing), found)
        write_synced(made / GUIDE, text.encode())
        _make_readable(made)
        size_bytes = rename_new(made, folder)
    return DeployReport(
        folder=str(folder),
        adapters=tuple(header.name for header in headers),
        rank=max(header.rank for header in headers),
        dtype=wanted.dtype,
        base_name=base_name,
        size_bytes=size_bytes,
        findings=tuple(found),
        chat=chat,
    )


def pad(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], rank: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same LoRA with a larger rank: zero rows in A, zero columns in B, alpha/r as before.

    Args:
        config: adapter_config.json of a plain LoRA of uniform rank.
        tensors: A of shape (r, inputs) and B of shape (outputs, r), by PEFT name.
        rank: At least the adapter's.
    """
    old = int(config["r"])
    padded = {}
    for name, tensor in tensors.items():
        rows, columns = tensor.shape
        larger = tensor.new_zeros((rank, columns) if ".lora_A." in name else (rows, rank))
        larger[:rows, :columns] = tensor
        padded[name] = larger
    alpha = config["lora_alpha"] * rank
    return {**config, "r": rank, "lora_alpha": alpha // old if alpha % old == 0 else alpha / old}, padded


def _prompt(manifest: Manifest, base_name: str) -> dict[str, Any]:
    """How keys become prompts, and the base model that alone answers them."""
    return {**manifest.prompt, "base_model": base_name, "base_fingerprint": manifest.fingerprint}


def _routes(session: Session, records: Iterable[StoredRecord], salt: str | None) -> Iterator[str]:
    """A line of JSON per record: which adapter answers the key, and what to ask it.

    Args:
        salt: Of the digests that stand for namespace and key; None names them, and the prompt's ids, which spell the
            key, with them.
    """
    for record in records:
        known = {"adapter": record.adapter, "chat": record.chat, "max_tokens": record.answer_tokens + 1}
        if salt is None:
            named = {"namespace": record.namespace, "key": record.key}
            line = {**named, **known, "prompt_ids": session.reader.prompt_ids(record)}
        else:
            hidden = session.manifest.key_salt is not None  # then the index has no keys either
            digest = record.key if hidden else hidden_names(salt, record.namespace, record.key)[1]
            line = {"salt": salt, "digest": digest, **known}
        yield json.dumps(line, ensure_ascii=False) + "\n"


def _as_gguf(session: Session, as_peft: Path, made: Path, headers: Sequence[AdapterHeader], wanted: Deployment) -> str:
    """Write every adapter as a GGUF file, and the embedded base model; returns what the guide calls the base."""
    from loramem.models.fingerprint import SUFFIX
    from loramem.models.gguf_file import require_gguf
    from loramem.models.pretrained import read_config
    from loramem.serving.gguf_adapter import Heads, write_adapter
    from loramem.serving.gguf_base import write_base

    require_gguf("Writing for llama.cpp")
    folder = session.base_folder() or session.base.folder
    base = Heads.of(read_config(folder, session.manifest.base_model).to_dict())
    for header in headers:
        tensors = load((as_peft / header.name / WEIGHTS).read_bytes())
        name = str(header.config["base_model_name_or_path"])
        write_adapter(made / f"{header.name}.gguf", header.config, tensors, base, name, wanted.dtype)
    if session.manifest.base_model != embedded.NAME:
        own = session.manifest.base_model
        return wanted.base_name or (own if own.endswith(SUFFIX) else BASE_FILE)
    kind = wanted.base_type or ("F16" if wanted.dtype == "float16" else "F32")
    write_base(folder, made / f"{embedded.NAME}-{kind}.gguf", kind)
    return f"{embedded.NAME}-{kind}.gguf"


def _make_readable(folder: Path) -> None:
    """Let other users read what no key stands in, as far as the umask lets them."""
    umask = os.umask(0o077)  # which cannot be asked without being set
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        if path.name != ROUTING:
            path.chmod((READABLE_FOLDER if path.is_dir() else READABLE_FILE) & ~umask)


def _committed(store: Path, adapter: StoredAdapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and weights of an adapter, read once and checked as they were read."""
    contents = {}
    for name in (CONFIG, WEIGHTS):
        try:
            contents[name] = (store / ADAPTERS / adapter.id / name).read_bytes()
        except OSError as error:
            raise IntegrityError(
                f"Adapter {adapter.id}: {name} cannot be read ({error.strerror}). Run loramem repair first.",
                what=adapter.id,
            ) from None
        if hashlib.sha256(contents[name]).hexdigest() != adapter.files[name]:
            raise IntegrityError(
                f"Adapter {adapter.id}: {name} is not what was committed. Run loramem repair first.", what=adapter.id
            )
    return json.loads(contents[CONFIG]), load(contents[WEIGHTS])


def _padded(
    name: str, config: dict[str, Any], tensors: dict[str, Tensor], rank: int | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if rank is None or rank == config["r"]:
        return config, tensors
    if rank < config["r"]:
        raise AdapterError(
            f"Adapter {name} has rank {config['r']}, above --pad-rank {rank}: padding adds rank, and cutting would "
            f"forget. Use at least {config['r']}."
        )
    return pad(config, tensors, rank)


def _files(name: str, config: dict[str, Any], tensors: dict[str, Tensor], wanted: Deployment) -> dict[str, bytes]:
    cast = {key: tensor.to(DTYPES[wanted.dtype]).contiguous() for key, tensor in sorted(tensors.items())}
    if not all(bool(tensor.isfinite().all()) for tensor in cast.values()):
        line = f"adapter {name}: weights beyond the range of {wanted.dtype}. Use bfloat16 or float32."
        raise NotServable(f"Not deployed: {line}", target=wanted.target, findings=[line])
    return {
        WEIGHTS: save(cast, metadata={"format": "pt"}),
        CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }


def _accepted(headers: list[AdapterHeader], found: list[Finding], target: Target) -> list[Finding]:
    """The notes among the findings.

    Raises:
        NotServable: There are others.
    """
    lines = list(_lines(finding for finding in found if finding.refused))
    if lines:
        more = f" ({len(lines) - 1} more like this)" if len(lines) > 1 else ""
        raise NotServable(f"Not deployed: {lines[0]}{more}", target=target, findings=lines)
    return [finding for finding in found if not finding.refused]


def _lines(found: Iterator[Finding]) -> Iterator[str]:
    for finding in found:
        yield f"adapter {finding.adapter}: {finding}" if finding.adapter else str(finding)
