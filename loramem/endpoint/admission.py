"""Who is let in: the right token, a name this server goes by, a body that is not too long, room and time to answer."""

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request

from loramem.endpoint.limits import Limits
from loramem.errors import RequestRefused

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Admission:
    """What is asked of every request before the store is.

    Args:
        token: That a client gives as its bearer token; None lets everyone in.
        hosts: Names that the server is asked by; None takes any. On loopback it keeps out pages of a browser, whose own
            name can be made to lead here.
    """

    def __init__(self, limits: Limits, token: str | None = None, hosts: Collection[str] | None = None) -> None:
        self.limits, self.hosts, self._inside = limits, hosts, 0
        self._digest = None if token is None else _digest(token.encode())

    def check(self, request: Request) -> None:
        """Refuse a stranger.

        Raises:
            RequestRefused: No or another token, or a foreign host name.
        """
        if self.hosts is not None and (request.url.hostname or "") not in self.hosts:
            raise RequestRefused(
                "This server is asked as localhost alone. Start it with --host for another name.",
                status=421,
                code="wrong_host",
            )
        if self._digest is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Digests are compared, so that the time tells neither the token's length nor how much of it was right.
        same = secrets.compare_digest(_digest(given.strip().encode("latin-1")), self._digest)
        if scheme.lower() != "bearer" or not same:
            raise RequestRefused(
                "Give the server's token: Authorization: Bearer TOKEN.", status=401, code="invalid_api_key"
            )

    async def body(self, request: Request) -> bytes:
        """The whole body.

        Raises:
            RequestRefused: It is too long, or too slow.
        """
        most, read = self.limits.body_bytes, bytearray()
        try:
            async with asyncio.timeout(self.limits.body_s):
                announced = request.headers.get("content-length", "0")
                too_long = announced.isdecimal() and int(announced) > most
                if not too_long:
                    async for part in request.stream():
                        read += part
                        if too_long := len(read) > most:
                            break
        except TimeoutError:
            raise RequestRefused(
                f"The body did not come within {self.limits.body_s:g} s.", status=408, code="slow_body"
            ) from None
        except ClientDisconnect:
            raise RequestRefused("The client went away.", status=400, code="disconnected") from None
        if too_long:
            raise RequestRefused(f"The body is longer than {most:,} bytes.", status=413, code="body_too_long")
        return bytes(read)

    @asynccontextmanager
    async def room(self) -> AsyncIterator[None]:
        """A place among the requests that are being answered, for as long as an answer may take.

        Raises:
            RequestRefused: There is none, or the time is over.
        """
        if self._inside >= self.limits.queue:
            raise RequestRefused(
                f"{self._inside} requests are being answered, as many as are taken on. Ask again in a second.",
                status=503,
                code="overloaded",
            )
        self._inside += 1
        try:
            async with asyncio.timeout(self.limits.answer_s):
                yield
        except TimeoutError:
            raise RequestRefused(
                f"There was no answer within {self.limits.answer_s:g} s. Ask again.", status=504, code="timeout"
            ) from None
        finally:
            self._inside -= 1


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
