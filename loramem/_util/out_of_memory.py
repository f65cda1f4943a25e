"""Exhausted memory told apart from every other failure, whichever library ran into it first."""

from collections.abc import Iterator
from contextlib import contextmanager

from loramem.errors import OutOfMemory, reason

# CPU: "can't allocate memory", Windows "not enough memory"; CUDA and MPS: "out of memory"; cuBLAS has its own name.
SIGNS = ("out of memory", "not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is exhausted; torch says so with a RuntimeError and a text."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def out_of_memory(error: BaseException) -> OutOfMemory:
    """Exhausted memory as an error of ours."""
    return OutOfMemory(
        f"Out of memory ({reason(error, 160)}). Use a smaller base model or shorter values, fewer workers, or "
        "another device. An interrupted write waits to be resumed or discarded."
    )


@contextmanager
def memory_errors() -> Iterator[None]:
    """Exhausted memory as an error of ours; any other error as it is.

    Raises:
        OutOfMemory: Memory is exhausted.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error) from error
