"""What this process computes on, in words. Torch is imported only when it is asked."""

import platform
from functools import cache
from pathlib import Path


@cache
def processor() -> str:
    """The processor's name, as the system gives it, and its vector instructions: clouds give several one name."""
    from torch.backends.cpu import get_cpu_capability

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({get_cpu_capability()})"


def hardware(device_type: str) -> str:
    """The processor, or the GPU where it computes on one."""
    import torch

    return torch.cuda.get_device_name() if device_type == "cuda" else processor()
