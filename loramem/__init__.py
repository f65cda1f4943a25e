"""loramem: facts written verbatim into LoRA adapters, and proved."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loramem.api.namespace import Namespace
    from loramem.api.store import MemoryStore
    from loramem.embedded import base_path
    from loramem.errors import KeyNotFound, LoramemError
    from loramem.planning.plan import Plan
    from loramem.records.input_files import read_records
    from loramem.records.record import Record
    from loramem.results import Explanation, Recall, VerifyReport, WriteReport
    from loramem.training.settings import WriterSettings

__all__ = [
    "Explanation",
    "KeyNotFound",
    "LoramemError",
    "MemoryStore",
    "Namespace",
    "Plan",
    "Recall",
    "Record",
    "VerifyReport",
    "WriteReport",
    "WriterSettings",
    "base_path",
    "read_records",
]

_HOME = {
    "Explanation": "results",
    "KeyNotFound": "errors",
    "LoramemError": "errors",
    "MemoryStore": "api.store",
    "Namespace": "api.namespace",
    "Plan": "planning.plan",
    "Recall": "results",
    "Record": "records.record",
    "VerifyReport": "results",
    "WriteReport": "results",
    "WriterSettings": "training.settings",
    "base_path": "embedded",
    "read_records": "records.input_files",
}


def __getattr__(name: str) -> Any:  # PEP 562: importing loramem imports none of this, torch least of all
    if name not in _HOME:
        raise AttributeError(f"module 'loramem' has no attribute {name!r}")
    return getattr(import_module(f"loramem.{_HOME[name]}"), name)
