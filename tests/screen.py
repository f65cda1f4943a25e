"""A terminal to print to, and what stands there."""

import io
import re

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    @property
    def text(self) -> str:
        """Without colours and movements of the cursor."""
        return ANSI.sub("", self.getvalue())
