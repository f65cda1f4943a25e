"""Connections on which no request comes: closed, since uvicorn waits for the rest of a header for ever."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_S = 15.0
"""Seconds between looks at a connection; one that had no request at two of them is closed."""


class WatchedProtocol(H11Protocol):
    """uvicorn's own, with a look at each connection from time to time."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look = self.loop.call_later(REQUEST_S, self._watch, None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._look.cancel()
        super().connection_lost(exc)

    def _watch(self, seen: Any) -> None:
        """Close the connection if nothing has begun since ``seen`` did, and that is over."""
        if self.cycle is seen and (seen is None or seen.response_complete):
            self.transport.close()
        else:
            self._look = self.loop.call_later(REQUEST_S, self._watch, self.cycle)
