"""Worker processes that end with the one that started them."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """In a worker: leave at once when the parent is gone, however it went; nobody would collect the result."""

    def watch() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
