"""Entry point: the command group, and exceptions as one line and an exit code."""

import io
import logging
import os
import sqlite3
import sys
import warnings
from collections.abc import Sequence
from gc import set_threshold  # there is a command of that name

import click

from loramem import errors
from loramem._util.out_of_memory import is_out_of_memory, out_of_memory

from . import (
    backup,
    calibrate,
    capacity,
    check,
    compact,
    deploy,
    erase,
    explain,
    export,
    gc,
    history,
    import_,
    law,
    ls,
    mcp,
    pull,
    push,
    put,
    recall,
    rename,
    repair,
    rm,
    serve,
    stats,
    suite,
    update,
    verify,
    write,
)
from .groups import Commands
from .output import Notes, note, prepare_streams

# First match wins, so subclasses stand before their bases. Documented in docs/reference/cli.md.
EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (errors.ArgumentError, 2),
    (errors.RecallError, 3),
    (errors.IntegrityError, 4),
    (errors.StubbornRecords, 5),
    (errors.DoesNotFit, 5),
    (errors.BaseHarmed, 5),
    (errors.TooLong, 5),
    (errors.KeyNotFound, 6),
    (errors.NotServable, 7),
    (errors.StoreNotFound, 10),
    (errors.StoreLocked, 11),
    (errors.OtherBaseModel, 12),
    (errors.HubError, 13),
    (errors.LoramemError, 1),
)
INTERRUPTED = 130
COLLECT = (10_000, 10, 100)
"""When Python looks for garbage, of each generation. torch and transformers make a million objects that stay; as often
as it does by itself, looking through them took a sixth of the time to import them, and a twentieth of a short write."""
MOST_COLUMNS = 120  # of help: longer lines are hard to read


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": MOST_COLUMNS})
@click.version_option(package_name="loramem")
@click.option("-v", "--verbose", is_flag=True, help="Log what happens to stderr.")
def cli(verbose: bool) -> None:
    """Write facts verbatim into LoRA adapters of a frozen language model, and prove it.

    The store is ./memory unless --store or LORAMEM_STORE names it; results go to stdout, everything else to stderr.
    """
    level = logging.INFO if verbose else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", handlers=[Notes()])
    if not verbose:  # a minute at a first write is said, whatever else is not
        warnings.simplefilter("ignore", FutureWarning)  # of libraries, to those who write programs
        logging.getLogger("loramem.planning.base_calibration").setLevel(logging.WARNING)
        logging.getLogger("loramem.workers.executors").setLevel(logging.WARNING)  # nor that a cluster has no workers


COMMANDS = (
    *(write, put, recall, explain, ls, stats, history),
    *(update, rename, rm, erase, compact, gc),
    *(verify, repair, export, import_, backup),
    *(push, pull),
    *(check, deploy, serve, mcp),
    *(capacity, calibrate, law, suite),
)
for command in COMMANDS:
    cli.add_command(command.command)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code and never raises for a user's mistake."""
    prepare_streams()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:  # Python keeps bytes that are not UTF-8 as surrogates, which no record can hold
            note(f"Error: the argument {argument!r} holds bytes that are not UTF-8.")
            return 2
    try:
        # click returns what ctx.exit(code) was given, and None from a command that just ends.
        return cli.main(args=arguments, standalone_mode=False) or 0
    except click.ClickException as error:
        _show(error)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        note("Interrupted.")
        return INTERRUPTED
    except OSError as error:  # a full disk, a folder that may not be written
        note(f"Error: {error}")
        return 1
    except sqlite3.Error as error:
        note(f"Error: index.db cannot be read ({error}). Run loramem verify --quick.")
        return 4
    except (MemoryError, RuntimeError) as error:  # of a command that computes without a store
        if not is_out_of_memory(error):
            raise
        note(f"Error: {out_of_memory(error)}")
        return 1
    except errors.LoramemError as error:
        note(f"Error: {' '.join(str(error).splitlines())}")  # names of files may hold line ends
        return next(code for kind, code in EXIT_CODES if isinstance(error, kind))


def _show(error: click.ClickException) -> None:
    """As click does, but wrapped for a terminal."""
    text = io.StringIO()
    error.show(file=text)
    note(text.getvalue().rstrip("\n"))


def main() -> None:
    if sys.stderr is None or not sys.stderr.isatty():  # read when huggingface_hub is first imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    set_threshold(*COLLECT)
    sys.exit(run())
