"""A server of llama.cpp in this process, over HTTP, as the guide of a deployed folder says to start it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2
import xllamacpp


@contextmanager
def serving(base: Path, adapters: Sequence[Path], *, slots: int = 1, cache_mib: int = 0) -> Iterator[str]:
    """The URL of ``llama-server -m BASE --lora-scaled A:0,B:0 --cache-ram 0``.

    Args:
        slots: Requests at once.
        cache_mib: Of memory for prompts of before; its own default is 8192.
    """
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 0.0) for path in adapters]
    params.cache_ram_mib, params.n_ctx, params.n_parallel = cache_mib, 1024 * slots, slots
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.n_gpu_layers, params.fit_params, params.warmup, params.verbosity = 0, False, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    yield server.listening_address
    del server  # which ends it


def post(url: str, **request: object) -> dict[str, object]:
    answer = httpx2.post(f"{url}/completion", json=request, timeout=60)
    answer.raise_for_status()
    found: dict[str, object] = answer.json()
    return found
