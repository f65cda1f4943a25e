"""Whether PEFT, vLLM and SGLang take adapters as they are, and what certificates are worth in a server's dtype."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loramem._util.choices import check_choice
from loramem._util.layout import ADAPTERS
from loramem.errors import IntegrityError
from loramem.index.rows import StoredRecord
from loramem.models.adapter_header import AdapterHeader, read_header
from loramem.models.dtypes import SERVED, Dtype
from loramem.results import AdapterCheck, ChatKeys, Finding, ServingReport
from loramem.serving.rules import Server, findings, findings_together
from loramem.serving.targets import LLAMA_CPP, NAMES, PEFT, Target
from loramem.store.integrity import file_problems
from loramem.store.manifest import Manifest
from loramem.store.session import Session

if TYPE_CHECKING:
    from loramem.models.base_fit import BaseShape


RECHECK = "loramem check --dtype bfloat16 (or float16) decodes every record there."


def check_store(
    session: Session,
    targets: Sequence[Target],
    *,
    max_rank: int | None = None,
    base_name: str | None = None,
    dtype: Dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ServingReport:
    """What servers would make of a store's adapters.

    Args:
        max_rank: The server's maximum, where it runs already.
        base_name: The model name or path that it is started with.
        dtype: Decode every record with base model and adapters cast to it; None decodes nothing.
        progress: Told how many records of how many were decoded.

    Raises:
        IntegrityError: An adapter's files are not what was committed.
        UnknownChoice: No such target or dtype.
    """
    if dtype is not None:
        check_choice("dtype", dtype, SERVED)
    with session.index.snapshot():
        adapters = list(session.index.adapters())
        for adapter in adapters:
            if found := file_problems(session.store, adapter):
                raise IntegrityError(f"{found[0]}. Run loramem repair first.", what=adapter.id)
        ended = session.index.tombstones()
        chat = chat_keys(session.manifest, session.index.records())
    tombstones = sum(ended.get(adapter.id, 0) for adapter in adapters)
    headers = [read_header(session.store / ADAPTERS / adapter.id) for adapter in adapters]
    servers = [server_of(session, target, max_rank, base_name) for target in targets]
    found_all = [finding for server in servers for finding in check_headers(headers, server)]
    for server in servers:
        found_all += notes_of(session.manifest, server, tombstones, chat, rechecked=dtype is not None)
    certificates: tuple[AdapterCheck, ...] = ()
    if dtype is not None:
        from loramem.store.certificates import check_certificates

        certificates = tuple(check_certificates(session, [adapter.id for adapter in adapters], dtype, progress))
    return ServingReport(
        tuple(targets), {header.name: header.rank for header in headers}, tuple(found_all), certificates, chat
    )


def chat_keys(manifest: Manifest, records: Iterable[StoredRecord]) -> ChatKeys | None:
    """Which keys may be asked by chat, as far as their rows say; None where there is no chat template."""
    if manifest.prompt["kind"] != "chat":
        return None
    known = [(record.key, record.chat) for record in records]
    safe = [chat for _, chat in known]
    return ChatKeys(safe.count(True), tuple(key for key, chat in known if chat is False), safe.count(None))


def check_folders(
    folders: Sequence[Path],
    targets: Sequence[Target],
    *,
    max_rank: int | None = None,
    base_name: str | None = None,
    model: str | None = None,
) -> ServingReport:
    """The same for adapters in folders, whoever wrote them; what they hold is not known, so nothing is decoded.

    Args:
        folders: Of one adapter each.
        max_rank: The server's maximum, where it runs already.
        base_name: The model name or path that it is started with.
        model: A base model, by Hub id, local folder or "loramem-tiny": every tensor's path and shape is compared with
            its modules, without loading weights. None compares with the configs alone.

    Raises:
        UnreadableAdapter: One of the folders is no PEFT LoRA.
        BaseModelNotFound: There is no such base model.
        UnsupportedBaseModel: It is no causal language model that can be built from its config.
    """
    headers = [read_header(folder) for folder in folders]
    found: list[Finding] = []
    base: BaseShape | None = None
    if model is not None:
        from loramem.models.base_fit import base_shape

        base = base_shape(model)
        for header in headers:
            for what in base.misfits(header):
                why = "the adapter was trained on another base model, or is not whole"
                remedy = "Use the base model that it was trained on, or save it again."
                found += [Finding(target, header.name, "fit", True, what, why, remedy) for target in targets]
    for target in targets:
        architecture = None if base is None else base.architecture
        server = Server(target, max_rank, base_name, architecture=architecture, compared=base is not None)
        found += check_headers(headers, server)
    return ServingReport(tuple(targets), {header.name: header.rank for header in headers}, tuple(found), ())


def check_headers(headers: Sequence[AdapterHeader], server: Server) -> list[Finding]:
    """What one server would make of these adapters, one by one and together."""
    alone = [finding for header in headers for finding in findings(header, server)]
    return alone + findings_together(headers, server)


def server_of(session: Session, target: Target, max_rank: int | None, base_name: str | None) -> Server:
    """What a store says of the server that would load its adapters."""
    is_local = session.manifest.revision is None  # otherwise its name is a Hub id, wherever it lies here
    return Server(target, max_rank, base_name, is_local, _architecture(session.base_folder()), rewritten=True)


def notes_of(
    manifest: Manifest, server: Server, tombstones: int, chat: ChatKeys | None, *, rechecked: bool
) -> list[Finding]:
    """What whoever serves a store's adapters should know.

    Args:
        tombstones: Records that ended and that the adapters still hold.
        chat: Which keys may be asked by chat.
        rechecked: Whether the certificates were looked at in the server's dtype already.
    """
    found = []
    if server.target != PEFT and not rechecked:
        what = f"certificates of a base in {manifest.dtype} and adapters in float32"
        why, remedy = f"{NAMES[server.target]} casts both to the dtype it serves in", RECHECK
        if server.target == LLAMA_CPP:
            why = "llama.cpp computes in the types of its file, and rounds what meets quantised weights"
            remedy = "loramem check --server URL asks the server for every key."
        found.append(Finding(server.target, None, "dtype", False, what, why, remedy))
    if tombstones:
        what = f"replaced or deleted records, {tombstones} of them"
        why = "the weights of adapters in use still hold them"
        found.append(Finding(server.target, None, "tombstones", False, what, why, "Run loramem compact --dead first."))
    if chat is not None and (chat.needs_ids or chat.unknown):
        counts = [(len(chat.needs_ids), "by ids, not by chat"), (chat.unknown, "perhaps by ids: older records")]
        what = "keys to be asked " + ", ".join(f"{how}, {count}" for count, how in counts if count)
        why = "the chat template may give them other ids than were trained, and the answer would be another"
        remedy = "loramem deploy --include-keys writes the ids, loramem ls --json says which keys."
        found.append(Finding(server.target, None, "prompt", False, what, why, remedy))
    return found


def _architecture(folder: Path | None) -> str | None:
    """The base model's, if its config is on this machine."""
    if folder is not None and folder.is_file():
        from loramem.models.gguf_file import ARCHITECTURES, read_gguf

        return ARCHITECTURES.get(read_gguf(folder, folder.name).architecture)
    try:
        names = json.loads((folder / "config.json").read_bytes()).get("architectures") if folder else None
    except (OSError, ValueError):
        return None
    return str(names[0]) if names else None
