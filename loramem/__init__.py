"""loramem: facts written verbatim into LoRA adapters, and proved."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loramem.api.namespace import Namespace
    from loramem.api.store import MemoryStore
    from loramem.embedded import base_path
    from loramem.errors import KeyNotFound, LoramemError
    from loramem.index.rows import PendingWrite, StoredAdapter, StoredRecord
    from loramem.models.base_model import BaseModel
    from loramem.models.dtypes import Dtype, DtypeChoice
    from loramem.planning.limits import GoalName, RankLimits
    from loramem.planning.plan import Plan, PlanInputs, ShardPlan
    from loramem.planning.rank_law import LawRank
    from loramem.records.input_files import read_records
    from loramem.records.outcome import Outcome
    from loramem.records.record import Record, RecordLike
    from loramem.results import (
        AdapterCheck,
        ChatKeys,
        CompactReport,
        DeployReport,
        Divergence,
        EraseReport,
        Explanation,
        Finding,
        GcReport,
        Kept,
        PushPlan,
        PushReport,
        Recall,
        RepairReport,
        ServerCheck,
        ServerReport,
        ServingReport,
        Stats,
        TokenProbability,
        VerifyReport,
        Version,
        WriteReport,
    )
    from loramem.serving.targets import BaseType, Target
    from loramem.store.compact import CompactChoice
    from loramem.store.request import OnConflict
    from loramem.training.progress import ProgressCallback, WriteProgress
    from loramem.training.settings import KeepBase, ObjectiveName, WriterSettings
    from loramem.workers.clusters import dask_executor, ray_executor
    from loramem.workers.executors import process_pool

__all__ = [
    "AdapterCheck",
    "BaseModel",
    "BaseType",
    "ChatKeys",
    "CompactChoice",
    "CompactReport",
    "DeployReport",
    "Divergence",
    "Dtype",
    "DtypeChoice",
    "EraseReport",
    "Explanation",
    "Finding",
    "GcReport",
    "GoalName",
    "KeepBase",
    "Kept",
    "KeyNotFound",
    "LawRank",
    "LoramemError",
    "MemoryStore",
    "Namespace",
    "ObjectiveName",
    "OnConflict",
    "Outcome",
    "PendingWrite",
    "Plan",
    "PlanInputs",
    "ProgressCallback",
    "PushPlan",
    "PushReport",
    "RankLimits",
    "Recall",
    "Record",
    "RecordLike",
    "RepairReport",
    "ServerCheck",
    "ServerReport",
    "ServingReport",
    "ShardPlan",
    "Stats",
    "StoredAdapter",
    "StoredRecord",
    "Target",
    "TokenProbability",
    "VerifyReport",
    "Version",
    "WriteProgress",
    "WriteReport",
    "WriterSettings",
    "base_path",
    "dask_executor",
    "process_pool",
    "ray_executor",
    "read_records",
]

_HOMES = {
    "api.namespace": "Namespace",
    "store.request": "OnConflict",
    "api.store": "MemoryStore",
    "embedded": "base_path",
    "errors": "KeyNotFound LoramemError",
    "index.rows": "PendingWrite StoredAdapter StoredRecord",
    "models.base_model": "BaseModel",
    "models.dtypes": "Dtype DtypeChoice",
    "planning.limits": "GoalName RankLimits",
    "planning.plan": "Plan PlanInputs ShardPlan",
    "planning.rank_law": "LawRank",
    "records.input_files": "read_records",
    "records.outcome": "Outcome",
    "records.record": "Record RecordLike",
    "results": "AdapterCheck ChatKeys CompactReport DeployReport Divergence EraseReport Explanation Finding GcReport "
    "Kept PushPlan PushReport Recall RepairReport ServerCheck ServerReport ServingReport Stats TokenProbability "
    "VerifyReport Version WriteReport",
    "serving.targets": "BaseType Target",
    "store.compact": "CompactChoice",
    "workers.clusters": "dask_executor ray_executor",
    "workers.executors": "process_pool",
    "training.progress": "ProgressCallback WriteProgress",
    "training.settings": "KeepBase ObjectiveName WriterSettings",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:  # PEP 562: importing loramem imports none of this, torch least of all
    if name not in _HOME:
        raise AttributeError(f"module 'loramem' has no attribute {name!r}")
    return getattr(import_module(f"loramem.{_HOME[name]}"), name)
