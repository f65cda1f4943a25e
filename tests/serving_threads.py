"""An endpoint on a socket of this machine, in a thread of this process."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from loramem.endpoint.backends import Backend
from loramem.endpoint.limits import Limits
from loramem.endpoint.server import address_of, listen, server_of


@contextmanager
def serving(backend: Backend, limits: Limits, **options: object) -> Iterator[str]:
    """Yields the URL that it answers at, with /v1."""
    with listen("127.0.0.1", 0) as bound:
        server = server_of(backend, "127.0.0.1", limits, **options)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield address_of(bound)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
