"""loramem: facts written verbatim into LoRA adapters, and proved."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loramem.capacity import Plan
    from loramem.embedded import base_path
    from loramem.errors import KeyNotFound, LoramemError
    from loramem.input_files import read_records
    from loramem.namespace import Namespace
    from loramem.records import Record
    from loramem.reports import Explanation, Recall, VerifyReport, WriteReport
    from loramem.settings import WriterSettings
    from loramem.store import MemoryStore

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
    "Explanation": "reports",
    "KeyNotFound": "errors",
    "LoramemError": "errors",
    "MemoryStore": "store",
    "Namespace": "namespace",
    "Plan": "capacity",
    "Recall": "reports",
    "Record": "records",
    "VerifyReport": "reports",
    "WriteReport": "reports",
    "WriterSettings": "settings",
    "base_path": "embedded",
    "read_records": "input_files",
}


def __getattr__(name: str) -> Any:  # PEP 562: importing loramem imports none of this, torch least of all
    if name not in _HOME:
        raise AttributeError(f"module 'loramem' has no attribute {name!r}")
    return getattr(import_module(f"loramem.{_HOME[name]}"), name)
