"""Options that several commands share."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loramem.errors import ArgumentError, InputError
from loramem.models.dtypes import DTYPES
from loramem.training.settings import MAX_RANK, WriterSettings

from .progress import waiting

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loramem import MemoryStore, RankLimits, Record
    from loramem.models.dtypes import Dtype, DtypeChoice
    from loramem.models.placement import Placement
    from loramem.planning.limits import GoalName

Command = Callable[..., Any]


class Numbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers above 0, separated by commas."""

    name = "N,N…"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        parts = value.split(",")
        if not all(part.isdecimal() and int(part) for part in parts):
            self.fail(f"{value!r} is not a list of numbers above 0, such as 100,400.", param, ctx)
        return tuple(map(int, parts))


class OutputPath(click.Path):
    """A file or folder to write, which lies in no store."""

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from loramem._util.files import outside_stores

        return outside_stores(Path(os.fsdecode(super().convert(value, param, ctx))))


_STORE = click.option(
    "--store",
    type=click.Path(path_type=Path),
    default=Path("memory"),
    show_default="./memory",
    envvar="LORAMEM_STORE",
    show_envvar=True,
    help="Folder of the store.",
)
_MODEL = click.option(
    "--model",
    envvar="LORAMEM_MODEL",
    show_envvar=True,
    help="Base model: a Hub id, a folder or a GGUF file. A new store takes loramem-tiny, an existing one its own.",
)
_DEVICE = click.option(
    "--device", default="auto", show_default=True, envvar="LORAMEM_DEVICE", show_envvar=True, help="auto, cpu, cuda…"
)
_NAMESPACE = click.option("--namespace", default="", help="Recall space, such as team/project.")
_RUNS = click.option(
    "--runs",
    type=OutputPath(path_type=Path, dir_okay=False),
    help="File of calibration runs (JSON lines); one in your cache folder unless given.",
)
_WAIT = click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="SECONDS",
    help="Wait so long for another process that is writing, and for the first worker; by default not at all.",
)
_ONE_ADAPTER = click.option(
    "--one-adapter",
    is_flag=True,
    help="All records of a namespace in one adapter, for a server of a single LoRA; may be slower by far.",
)


def _templates(_ctx: click.Context, _param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    from loramem.records.questions import check_templates

    check_templates(value)
    return value


_ASK = click.option(
    "--ask",
    callback=_templates,
    multiple=True,
    metavar="TEMPLATE",
    help="A question that gives the value as the key does, with {key} in its place (less a colon at its end), such as "
    '"What is the phone number of {key}?"; may be repeated. Each is trained and proved.',
)
_CALIBRATE = click.option(
    "--calibrate/--no-calibrate",
    default=None,
    help="Measure a base model that nothing is known of first, which takes about a minute, once; LORAMEM_CALIBRATE=1 "
    "says so of all commands.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")


@dataclass(frozen=True)
class StoreOptions:
    """Which store, with which base model, and how long to wait for it."""

    path: Path
    model: str | None
    device: str
    wait_s: float = 0.0
    calibrate: bool | None = None
    """See `loramem.MemoryStore`."""

    def open(
        self,
        *,
        create: bool = False,
        keep_values: bool | None = None,
        serve: "Sequence[Dtype] | None" = None,
        dtype: "DtypeChoice" = "auto",
    ) -> "MemoryStore":
        """The store; see `loramem.MemoryStore`."""
        from loramem import MemoryStore

        return MemoryStore(
            self.path,
            self.model,
            device=self.device,
            dtype=dtype,
            create=create,
            keep_values=keep_values,
            serve=serve,
            wait_s=self.wait_s,
            calibrate=self.calibrate,
        )

    def load(
        self, *, create: bool = False, keep_values: bool | None = None, serve: "Sequence[Dtype] | None" = None
    ) -> "MemoryStore":
        """The store with its base model, for what is sure to need it."""
        with waiting("loading the base model"):
            opened = self.open(create=create, keep_values=keep_values, serve=serve)
            try:
                _ = opened.base
            except BaseException:
                opened.close()
                raise
            return opened


def dtype_option(command: Command) -> Command:
    """What a command that only reads computes in."""
    return click.option(
        "--dtype",
        type=click.Choice(["auto", *DTYPES]),
        default="auto",
        show_default="auto: the store's",
        help="Compute in it; bfloat16 is faster where the processor multiplies it. Values are compared all the same.",
    )(command)


@dataclass(frozen=True)
class InputOptions:
    """How a file of records is read."""

    format: str | None
    delimiter: str | None
    key_field: str
    value_field: str

    def read(self, file: Path, namespace: str = "") -> "list[Record]":
        """Records of a file, or of stdin for -.

        Raises:
            InputError, RecordError: See `loramem.read_records`; also if there are none.
        """
        records = list(self.stream(file, namespace))
        if not records:
            raise InputError(f"{'Standard input' if str(file) == '-' else file} holds no records.")
        return records

    def stream(self, file: Path, namespace: str = "") -> "Iterator[Record]":
        """The same as they are asked for, perhaps none."""
        from loramem.records.input_files import stream_records

        return stream_records(
            sys.stdin.buffer if str(file) == "-" else file,
            format=self.format,
            delimiter=self.delimiter,
            key_field=self.key_field,
            value_field=self.value_field,
            namespace=namespace,
        )


@dataclass(frozen=True)
class RankOptions:
    """Which ranks adapters get."""

    goal: "GoalName"
    rank: int | None
    max_rank: int

    def limits(self, choices: tuple[int, ...] = ()) -> "RankLimits":
        """The ranks allowed; a first rank beyond them is a wrong option."""
        from loramem.planning.limits import RankLimits, check_request

        try:
            limits = RankLimits(self.max_rank, choices)
            check_request(self.goal, self.rank, limits)
        except ArgumentError as error:
            raise click.UsageError(f"{error}.") from None
        return limits

    def settings(self, seed: int = 0) -> WriterSettings:
        """How to train within the ranks allowed; raises as `limits`."""
        self.limits()
        return WriterSettings(max_rank=self.max_rank, seed=seed)


def store_options(command: Command) -> Command:
    """--store, --model, --device and --json; all but --json, and --wait, as ``store``, `StoreOptions`."""

    @wraps(command)
    def with_store(
        *,
        store: Path,
        model: str | None,
        device: str,
        wait_s: float = 0.0,
        calibrate: bool | None = None,
        **others: Any,
    ) -> Any:
        chosen = StoreOptions(store, model, device, wait_s, calibrate)
        return command(store=chosen, **others)

    return _STORE(model_options(with_store))


def model_options(command: Command) -> Command:
    """--model, --device and --json."""
    return _MODEL(_DEVICE(_JSON(command)))


def store_option(command: Command) -> Command:
    """--store alone."""
    return _STORE(command)


def json_option(command: Command) -> Command:
    """--json alone."""
    return _JSON(command)


def planned_store_options(command: Command) -> Command:
    """`store_options` and --calibrate, of commands that plan writes."""
    return store_options(_CALIBRATE(command))


def planned_change_options(command: Command) -> Command:
    """`change_options` and --calibrate."""
    return change_options(_CALIBRATE(command))


def change_options(command: Command) -> Command:
    """`store_options` and --wait, of commands that change the store."""
    return store_options(_WAIT(command))


def namespace_option(command: Command) -> Command:
    return _NAMESPACE(command)


def runs_option(command: Command) -> Command:
    return _RUNS(command)


def goal_options(command: Command) -> Command:
    """--goal, --rank and --max-rank, as ``ranks``, `RankOptions`."""

    @wraps(command)
    def with_ranks(*, goal: "GoalName", rank: int | None, max_rank: int, **others: Any) -> Any:
        return command(ranks=RankOptions(goal, rank, max_rank), **others)

    goal = click.option(
        "--goal", type=click.Choice(["fast", "small"]), default="fast", show_default=True, help="Seconds or parameters."
    )
    rank = click.option("--rank", type=click.IntRange(1), help="First rank, in place of the planned one.")
    max_rank = click.option(
        "--max-rank", type=click.IntRange(1), default=MAX_RANK, show_default=True, help="Highest rank allowed."
    )
    return goal(rank(max_rank(with_ranks)))


def one_adapter_option(command: Command) -> Command:
    return _ONE_ADAPTER(command)


def ask_option(command: Command) -> Command:
    return _ASK(command)


def _delimiter(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    return "\t" if value in ("tab", "\\t") else value  # a tab is hard to type


def input_options(command: Command) -> Command:
    """--format, --delimiter, --key-field and --value-field, as ``fields``, `InputOptions`."""

    @wraps(command)
    def with_fields(
        *, format_: str | None, delimiter: str | None, key_field: str, value_field: str, **others: Any
    ) -> Any:
        return command(fields=InputOptions(format_, delimiter, key_field, value_field), **others)

    decorated: Command = with_fields
    for option in (
        click.option("--value-field", default="value", show_default=True, help="Field that holds the value."),
        click.option("--key-field", default="key", show_default=True, help="Field that holds the key."),
        click.option(
            "--delimiter",
            metavar="CHARACTER",
            callback=_delimiter,
            help="Of CSV and TSV, such as ';' or tab; by default what a first line sep=; says, else comma or tab.",
        ),
        click.option(
            "--format",
            "format_",
            type=click.Choice(["jsonl", "ndjson", "json", "csv", "tsv"]),
            help="Format of FILE; by its suffix unless given, jsonl for stdin.",
        ),
    ):
        decorated = option(decorated)
    return decorated


def named_values(given: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE options by name."""
    pairs = [text.partition("=") for text in given]
    for text, (name, equals, _) in zip(given, pairs, strict=True):
        if not name or not equals:
            raise click.UsageError(f"--meta takes NAME=VALUE, not {text!r}.")
    return {name: value for name, _, value in pairs}


def placement(model: "PreTrainedModel", modules: str | None, layers: str | None) -> "Placement":
    """The placement that --modules and --layers name; where writes begin for what is not named."""
    from loramem.models.placement import Placement

    default = Placement.ladder(model)[0]
    names = tuple(sorted(modules.split(","))) if modules else default.modules
    if layers and not all(part.isdecimal() for part in layers.split(",")):
        raise click.UsageError(f"--layers takes numbers from 0, such as 4,5, not {layers!r}.")
    try:
        return Placement.named(model, names, tuple(sorted(map(int, layers.split(",")))) if layers else default.layers)
    except ArgumentError as error:
        raise click.UsageError(str(error)) from None
