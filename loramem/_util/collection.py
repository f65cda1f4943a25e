"""Python's collector of cycles, out of the way while many objects are made that stay."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Without it: it looks through all objects there are, a model's modules too, whenever a quarter more have come.

    May be entered by several threads; it is on again when the one that found it on leaves.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
