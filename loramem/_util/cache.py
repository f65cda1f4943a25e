"""JSON files in the user's cache: replaced as a whole, and missed by nobody when they are lost or damaged."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar
from uuid import uuid4

import platformdirs

log = logging.getLogger(__name__)

T = TypeVar("T")
DAMAGED = (ValueError, KeyError, TypeError, AttributeError)
"""What reading JSON of another shape raises."""


def cache_folder() -> Path:
    """Where everything lies that this package can make again; moved with XDG_CACHE_HOME."""
    return platformdirs.user_cache_path("loramem")


class JsonFile(Generic[T]):
    """One value in one file, which other processes may replace meanwhile: a reader sees the old one or the new.

    Args:
        parse: Makes the value of what JSON gives; what it raises of `DAMAGED` says that the file is damaged.
    """

    def __init__(self, path: Path, parse: Callable[[Any], T]) -> None:
        self.path, self._parse = path, parse

    def load(self) -> T:
        """The value.

        Raises:
            OSError: There is no such file, or it cannot be read.
            ValueError, KeyError, TypeError, AttributeError: It is damaged.
        """
        return self._parse(json.loads(self.path.read_text(encoding="utf-8")))

    def known(self) -> T | None:
        """The value; None where the file is absent or damaged."""
        try:
            return self.load()
        except (OSError, *DAMAGED):
            log.debug("%s is not in the cache, or damaged", self.path)
            return None

    def save(self, content: object) -> None:
        """Write the value beside and move it there, folders included.

        Raises:
            OSError: It cannot be written.
            ValueError: NaN or Inf, which JSON does not have.
        """
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f"{self.path.name}.{uuid4().hex}.partial")  # of this call alone
        try:
            beside.write_text(text, encoding="utf-8")
            beside.replace(self.path)
        finally:
            beside.unlink(missing_ok=True)

    def remember(self, content: object) -> None:
        """`save`, where that is possible."""
        try:
            self.save(content)
        except OSError:
            log.debug("%s is not writable", self.path)
