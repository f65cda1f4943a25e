"""Everything loramem raises on purpose.

    LoramemError
    ├── RecordError (ValueError)      one input record cannot be written; nothing was changed
    │   ├── EmptyField                empty key or value
    │   ├── InvalidField              missing field, not a string, or text that UTF-8 cannot hold
    │   ├── ConflictingRecord         the key is there already with another value
    │   ├── QuestionTaken             a question asks for another record already, or is one's key
    │   ├── PromptCollision           two keys whose prompts have the same token ids
    │   ├── SpecialTokenInText        key or value spells a special token of the tokenizer
    │   ├── NotRoundTrip              the tokenizer does not give the value back exactly
    │   ├── UnreachableToken          the base model's head cannot tell one of the value's tokens from another
    │   └── TooLong                   prompt and answer exceed the base model's context
    ├── InputError (ValueError)       the input as a whole: unknown format, not UTF-8, broken JSON
    ├── ArgumentError (ValueError)    an argument or setting cannot be, or contradicts another
    │   └── UnknownChoice             it is none of the strings that it may be
    ├── KeyNotFound (KeyError)        no committed record has this key
    ├── RecallError                   the weights did not give a value back; no value is returned
    ├── WriteError
    │   ├── StubbornRecords           some records could not be certified at the highest rank
    │   ├── DoesNotFit                no adapter of the ranks allowed can hold the values
    │   ├── BaseHarmed                an adapter changes more of its base than was allowed
    │   ├── TrainingDiverged          NaN or Inf came back at every lower learning rate
    │   └── UnfinishedWrite           a journalled write waits to be resumed or discarded
    ├── WorkerError                   of the processes that train for a write, which stays journalled once it began
    │   ├── WorkerLost                a worker process ended in the middle of a write; it can be resumed
    │   ├── NoWorkers                 there is nobody to train
    │   ├── OtherRelease              a worker has another release of a library that decides what adapters are
    │   └── RefusedResult             what a worker returned is not what it was asked for
    ├── StoreError
    │   ├── StoreNotFound             there is no store at this path
    │   ├── StoreFormatError          not a store, or one of a newer format
    │   ├── StoreLocked               another process is writing
    │   ├── StoreReadOnly             the store's folder cannot be written
    │   ├── StoreChanged              a record was replaced or deleted while it was being read
    │   ├── DeletedInWeights          adapters to be published still hold records that were deleted or replaced
    │   └── BundleError               not an export of a store, or a damaged one
    ├── LawError (ValueError)         a number of the memory law makes no sense
    │   ├── DegeneratePoints          the measured runs determine no law
    │   └── OutOfReach                no rank or length gives this loss reduction
    ├── BoundaryError (ValueError)    the outcomes give no success boundary, or it has no answer
    ├── AdapterError                  about adapters as files that other tools load
    │   ├── UnreadableAdapter         a folder is no PEFT LoRA, or cannot be read as one
    │   └── NotServable               a server would refuse the adapters, or serve something else
    ├── IntegrityError                a file or row is not what was committed
    ├── RequestRefused                the endpoint does not take a request; the client can do something about it
    ├── ServerError                   a server of adapters does not answer, or gives something else than answers
    ├── HubError                      the Hub cannot be reached, or said no
    │   ├── HubOffline                Hub calls are switched off
    │   ├── HubAccess                 no such repository for this token, or no right to do this
    │   ├── HubConflict               the repository has moved on since this store last knew it
    │   ├── PublicRepository          everyone could extract the records, which was not asked for
    │   ├── NotAPublication           the repository holds no store that loramem published
    │   └── RefusedRepository         what it holds breaks a rule; nothing of it was taken
    └── BaseModelError
        ├── BaseModelNotFound         no such model, or it cannot be loaded
        ├── UnsupportedBaseModel      it loads, but adapters cannot be written for it
        ├── OutOfMemory               it, or a batch that it was to compute, does not fit into memory
        └── OtherBaseModel            not the base model that the store was written with

Every error carries its facts as attributes, so that callers never parse its text.
"""

from collections.abc import Mapping, Sequence
from typing import Any


class LoramemError(Exception):
    """Base class of all errors that loramem raises on purpose.

    They cross process boundaries as they are: pickling keeps message and attributes.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call the class with the message alone; many take keyword arguments as well.
        return _restored, (type(self), self.args, vars(self))


def reason(error: BaseException, limit: int = 200) -> str:
    """What an error of another library says, in one line; its name if it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + "…"


def is_failure(error: BaseException) -> bool:
    """Whether code of another library failed; interrupts and exits did not.

    What Rust code panics with (tokenizers, safetensors) is no `Exception`, and its class cannot be imported.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _restored(kind: type[LoramemError], args: tuple[Any, ...], attributes: dict[str, Any]) -> LoramemError:
    error = kind.__new__(kind, *args)
    vars(error).update(attributes)
    return error


class RecordError(LoramemError, ValueError):
    """One input record cannot be written. Attributes: ``key``, ``line`` (1-based, or None)."""

    def __init__(self, message: str, *, key: str | None = None, line: int | None = None) -> None:
        super().__init__(f"Line {line}: {message}" if line is not None else message)
        self.key, self.line = key, line


class EmptyField(RecordError):
    """Key or value is the empty string."""


class InvalidField(RecordError):
    """A field is missing, not a string, or holds text that UTF-8 cannot encode."""


class ConflictingRecord(RecordError):
    """The key exists already with another value, in the same input or in the store."""


class QuestionTaken(RecordError):
    """One text asks for two records: as a question of each, or as the key of one. Attribute ``other``: key of the one
    that has it."""

    def __init__(self, message: str, *, other: str, key: str | None = None, line: int | None = None) -> None:
        super().__init__(message, key=key, line=line)
        self.other = other


class PromptCollision(RecordError):
    """Two different keys give the same prompt token ids. Attribute ``other``: the other key."""

    def __init__(self, message: str, *, other: str, key: str | None = None, line: int | None = None) -> None:
        super().__init__(message, key=key, line=line)
        self.other = other


class SpecialTokenInText(RecordError):
    """Key or value spells a special token. Attribute ``token``."""

    def __init__(self, message: str, *, token: str, key: str | None = None, line: int | None = None) -> None:
        super().__init__(message, key=key, line=line)
        self.token = token


class NotRoundTrip(RecordError):
    """Decoding the value's tokens does not give the value. Attributes ``expected``, ``got``."""

    def __init__(
        self, message: str, *, expected: str, got: str, key: str | None = None, line: int | None = None
    ) -> None:
        super().__init__(message, key=key, line=line)
        self.expected, self.got = expected, got


class UnreachableToken(RecordError):
    """A token of the value can never have p > 0.5 under this base model. Attribute ``token``: its text."""

    def __init__(self, message: str, *, token: str, key: str | None = None, line: int | None = None) -> None:
        super().__init__(message, key=key, line=line)
        self.token = token


class TooLong(RecordError):
    """Prompt plus answer exceed the context. Attributes ``tokens``, ``limit``."""

    def __init__(
        self, message: str, *, tokens: int, limit: int, key: str | None = None, line: int | None = None
    ) -> None:
        super().__init__(message, key=key, line=line)
        self.tokens, self.limit = tokens, limit


class InputError(LoramemError, ValueError):
    """The input cannot be read at all."""


class ArgumentError(LoramemError, ValueError):
    """An argument or a setting cannot be, or contradicts another. Attributes ``argument`` (its name), ``value``."""

    def __init__(self, message: str, *, argument: str, value: object) -> None:
        super().__init__(message)
        self.argument, self.value = argument, value


class UnknownChoice(ArgumentError):
    """An argument is none of the strings that it may be. Attribute ``choices``: what it may be."""

    def __init__(self, argument: str, value: str, choices: Sequence[str]) -> None:
        super().__init__(
            f"{argument} must be one of {', '.join(choices)}, not {value!r}", argument=argument, value=value
        )
        self.choices = tuple(choices)


class KeyNotFound(LoramemError, KeyError):
    """No committed record has this key.

    Attributes ``key``, ``namespace``, ``close`` (similar keys), ``successor`` (the key it was renamed to, or None).
    """

    def __init__(
        self, key: str, *, namespace: str = "", close: Sequence[str] = (), successor: str | None = None
    ) -> None:
        where = f" in namespace {namespace!r}" if namespace else ""
        hint = f" Close keys: {', '.join(map(repr, close))}." if close else ""
        if successor is not None:
            hint = f" It was renamed to {successor!r}: use that."
        super().__init__(f"No record has the key {key!r}{where}.{hint}")
        self.key, self.namespace, self.close, self.successor = key, namespace, tuple(close), successor

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0])


class RecallError(LoramemError):
    """Decoding did not give the committed value. Attributes ``key``, ``adapter``, ``doubtful`` (keys that the
    same proof was least certain of)."""

    def __init__(self, message: str, *, key: str, adapter: str, doubtful: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.key, self.adapter, self.doubtful = key, adapter, tuple(doubtful)


class WriteError(LoramemError):
    """A write did not commit."""


class StubbornRecords(WriteError):
    """Some records could not be certified. Attributes ``keys`` (the stubborn ones), ``rank`` (the last tried),
    ``doubtful`` (keys that a proof was least certain of)."""

    def __init__(self, message: str, *, keys: Sequence[str], rank: int, doubtful: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.keys, self.rank, self.doubtful = tuple(keys), rank, tuple(doubtful)


class DoesNotFit(WriteError):
    """More bits than the highest rank allowed can hold. Attributes ``cost_bits``, ``rank``."""

    def __init__(self, message: str, *, cost_bits: float, rank: int) -> None:
        super().__init__(message)
        self.cost_bits, self.rank = cost_bits, rank


class BaseHarmed(WriteError):
    """An adapter changes more of its base than was allowed. Attributes ``misses`` (what, found and allowed), ``rank``
    (the last tried)."""

    def __init__(self, message: str, *, misses: Mapping[str, tuple[float, float]], rank: int) -> None:
        super().__init__(message)
        self.misses, self.rank = dict(misses), rank


class TrainingDiverged(WriteError):
    """The loss became NaN or Inf, at lower learning rates too. Attributes ``step``, ``learning_rate``."""

    def __init__(self, message: str, *, step: int, learning_rate: float) -> None:
        super().__init__(message)
        self.step, self.learning_rate = step, learning_rate


class WorkerError(LoramemError):
    """Processes that were to train for a write did not."""


class WorkerLost(WorkerError):
    """A worker process ended in the middle of a write, which stays journalled."""


class NoWorkers(WorkerError):
    """There are no workers to run on, or none any more."""


class OtherRelease(WorkerError):
    """A worker has another release of a library. Attributes ``expected``, ``got`` (by name), ``host``."""

    def __init__(self, message: str, *, expected: Mapping[str, str], got: Mapping[str, str], host: str) -> None:
        super().__init__(message)
        self.expected, self.got, self.host = dict(expected), dict(got), host


class RefusedResult(WorkerError):
    """What a worker returned is not the adapter that it was asked for. Attribute ``what``."""

    def __init__(self, message: str, *, what: str) -> None:
        super().__init__(message)
        self.what = what


class UnfinishedWrite(WriteError):
    """A journalled write was interrupted. Attributes ``write_id``, ``records`` (how many)."""

    def __init__(self, message: str, *, write_id: int, records: int) -> None:
        super().__init__(message)
        self.write_id, self.records = write_id, records


class StoreError(LoramemError):
    """The store as a whole cannot be used."""


class StoreNotFound(StoreError):
    """There is no store at this path."""


class StoreFormatError(StoreError):
    """The folder is not a store, or one of a format this version does not read."""


class StoreLocked(StoreError):
    """Another process is writing to the store. Attributes ``pid``, ``host``, ``since``: who, None if unknown."""

    def __init__(self, message: str, *, pid: int | None, host: str | None, since: str | None) -> None:
        super().__init__(message)
        self.pid, self.host, self.since = pid, host, since


class StoreReadOnly(StoreError):
    """The store's folder cannot be written, so that it can only be read."""


class StoreChanged(StoreError):
    """A record was replaced or deleted, and its adapter removed, while it was being read. Attribute ``key``."""

    def __init__(self, message: str, *, key: str) -> None:
        super().__init__(message)
        self.key = key


class DeletedInWeights(StoreError):
    """Adapters that are to be published still hold deleted or replaced records. Attribute ``records``: how many."""

    def __init__(self, message: str, *, records: int) -> None:
        super().__init__(message)
        self.records = records


class BundleError(StoreError):
    """The file or folder is not an export of a store, or not what was exported."""


class AdapterError(LoramemError):
    """Something about adapters as files that other tools load."""


class UnreadableAdapter(AdapterError):
    """The folder is no PEFT LoRA adapter, or one that cannot be read."""


class NotServable(AdapterError):
    """A server would refuse the adapters, or serve another function. Attributes ``target``, ``findings`` (lines)."""

    def __init__(self, message: str, *, target: str, findings: Sequence[str]) -> None:
        super().__init__(message)
        self.target, self.findings = target, tuple(findings)


class IntegrityError(LoramemError):
    """A file or an index row is not what was committed. Attribute ``what``: the damaged thing."""

    def __init__(self, message: str, *, what: str) -> None:
        super().__init__(message)
        self.what = what


class RequestRefused(LoramemError):
    """The endpoint does not take a request. Attributes ``status`` (of HTTP), ``code`` (a word), ``param`` (a field)."""

    def __init__(self, message: str, *, status: int, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


class ServerError(LoramemError):
    """A server that adapters are asked of is not there, lacks one, or gives no answers. Attribute ``url``."""

    def __init__(self, message: str, *, url: str) -> None:
        super().__init__(message)
        self.url = url


class HubError(LoramemError):
    """The Hub cannot be reached, or did not do what was asked. Attribute ``repo``."""

    def __init__(self, message: str, *, repo: str) -> None:
        super().__init__(message)
        self.repo = repo


class HubOffline(HubError):
    """HF_HUB_OFFLINE forbids calls to the Hub."""


class HubAccess(HubError):
    """There is no such repository or revision that this token may see, or it may not be written."""


class HubConflict(HubError):
    """Somebody else has committed to the repository. Attributes ``expected`` and ``got``: commits, None if unknown."""

    def __init__(self, message: str, *, repo: str, expected: str | None, got: str | None) -> None:
        super().__init__(message, repo=repo)
        self.expected, self.got = expected, got


class PublicRepository(HubError):
    """The repository is public: everyone could extract the records."""


class NotAPublication(HubError):
    """The repository holds no published store, such as one of a plain PEFT adapter."""


class RefusedRepository(HubError):
    """A published store breaks a rule of the format. Attribute ``what``: the file or thing that does."""

    def __init__(self, message: str, *, repo: str, what: str) -> None:
        super().__init__(message, repo=repo)
        self.what = what


class BaseModelError(LoramemError):
    """Something about the base model."""


class BaseModelNotFound(BaseModelError):
    """There is no such base model, or it cannot be loaded."""


class UnsupportedBaseModel(BaseModelError):
    """The base model loads, but loramem cannot write adapters for it."""


class OutOfMemory(BaseModelError):
    """The base model, or a batch that it was to compute, does not fit into the device's memory."""


class OtherBaseModel(BaseModelError):
    """The base model is not the one the store was written with. Attributes ``expected``, ``got``."""

    def __init__(self, message: str, *, expected: str, got: str) -> None:
        super().__init__(message)
        self.expected, self.got = expected, got


class LawError(LoramemError, ValueError):
    """The points determine no law, or the law has no answer."""


class DegeneratePoints(LawError):
    """Too few points, or too alike. Attributes ``points`` (left to fit), ``dropped`` (saturated)."""

    def __init__(self, message: str, *, points: int, dropped: int) -> None:
        super().__init__(message)
        self.points, self.dropped = points, dropped


class OutOfReach(LawError):
    """No rank or length gives this loss reduction. Attribute ``loss_reduction`` (nats per token)."""

    def __init__(self, message: str, *, loss_reduction: float) -> None:
        super().__init__(message)
        self.loss_reduction = loss_reduction


class BoundaryError(LoramemError, ValueError):
    """The outcomes give no boundary, or the question has no answer."""
