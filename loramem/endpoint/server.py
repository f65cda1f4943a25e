"""The endpoint on a socket: what `loramem serve` runs until it is interrupted."""

import socket

import uvicorn

from loramem.endpoint.admission import LOOPBACK, Admission
from loramem.endpoint.app import Endpoint, Unknown
from loramem.endpoint.backends import Backend
from loramem.endpoint.connections import WatchedProtocol
from loramem.endpoint.limits import Limits

CONNECTIONS = 4
"""So many times as many connections as requests are taken on; clients keep theirs between requests."""
KEEP_ALIVE_S = 30
GRACE_S = 5


def listen(host: str, port: int) -> socket.socket:
    """A socket that nobody is answered on yet.

    Args:
        port: 0 for any that is free.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


def server_of(
    backend: Backend, host: str, limits: Limits, *, token: str | None = None, unknown: Unknown = "error"
) -> uvicorn.Server:
    """A server of a backend's records; ``run(sockets=[…])`` answers, ``should_exit = True`` ends it.

    Args:
        host: That its socket is bound to. On a loopback address it answers to names of this machine alone.
        token: See `Admission`.
        unknown: See `Unknown`.
    """
    admission = Admission(limits, token, LOOPBACK if host in LOOPBACK else None)
    config = uvicorn.Config(
        Endpoint(backend, admission, unknown).app(),
        http=WatchedProtocol,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="on",
        limit_concurrency=CONNECTIONS * limits.queue,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
    )
    return uvicorn.Server(config)


def address_of(bound: socket.socket) -> str:
    """Where a socket is asked, as a URL."""
    host, port, *_ = bound.getsockname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
