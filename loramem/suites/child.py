"""A cell of a suite in a fresh process, so that its memory is its own: ``python -m loramem.suites.child``.

Not one of `multiprocessing`: Dask's workers may have no such children.
"""

import os
import pickle
import subprocess
import sys
import threading

from loramem.errors import WorkerLost
from loramem.suites.runner import Cell, Result, measure


def measure_afresh(module: str, cell: Cell, threads: int) -> Result:
    """`loramem.suites.runner.measure` in a process of its own.

    Raises what it raises.

    Raises:
        WorkerLost: The process ended otherwise.
    """
    command = [sys.executable, "-m", __name__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(pickle.dumps((module, cell, threads)))
        process.stdin.flush()  # and left open: its end tells the process that this one is gone
        answer = process.stdout.read()
        process.wait()
    if process.returncode:
        raise WorkerLost(
            f"The process that measured {cell.title} ended with {process.returncode} (killed, or out of memory). Give "
            "its worker more memory, and run the suite again: it goes on from there."
        )
    result: Result | Exception = pickle.loads(answer)
    if isinstance(result, Exception):
        raise result
    return result


def _main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # what a suite prints is no answer
    module, cell, threads = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    result: Result | Exception
    try:
        result = measure(module, cell, threads)
    except Exception as error:
        result = error
    with os.fdopen(answers, "wb") as file:
        file.write(pickle.dumps(result))


def _leave_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    _main()
