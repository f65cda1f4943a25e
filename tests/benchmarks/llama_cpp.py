"""What comes back from llama.cpp: a store deployed, served on each of some files of its base model, asked for all.

    python -m tests.benchmarks.llama_cpp STORE BASE.gguf… [--of MODEL --types F16 Q8_0] [--at-once 1]

A line per base: records exact of all, the lowest p that the server tells, the lowest certificate, CPU seconds. MODEL
is a base's folder that is written as GGUF files of these types first.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from loramem import MemoryStore, ServerReport
from loramem.serving.gguf_base import write_base
from loramem.serving.targets import BASE_TYPES

from ..llama_server import serving


def measured(store: MemoryStore, base: Path, folder: Path, at_once: int = 1) -> tuple[ServerReport, float]:
    """What the server says, and the CPU seconds of this process for asking all.

    Args:
        folder: Deployed.
    """
    adapters = [folder / f"{adapter.id}.gguf" for adapter in store.adapters()]
    with serving(base, adapters, slots=at_once) as url:
        began = time.process_time()
        return store.check_server(url, "llama.cpp", at_once=at_once), time.process_time() - began


def line(base: str, report: ServerReport, cpu_s: float) -> str:
    exact, records = (sum(getattr(one, name) for one in report.adapters) for name in ("exact", "records"))
    lowest = min((one.min_prob for one in report.adapters if one.min_prob is not None), default=float("nan"))
    committed = min(one.committed_min_prob for one in report.adapters if one.committed_min_prob is not None)
    return f"| {base} | {exact}/{records} | {lowest:.3f} | {committed:.3f} | {cpu_s:.1f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("bases", nargs="*", type=Path)
    parser.add_argument("--of", type=Path)
    parser.add_argument("--types", nargs="*", choices=BASE_TYPES, default=[])
    parser.add_argument("--at-once", type=int, default=1)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary, MemoryStore(given.store, create=False) as store:
        store.deploy("llama.cpp", Path(temporary) / "served")
        bases = list(given.bases)
        for kind in given.types:
            bases.append(Path(temporary) / f"{given.of.name}-{kind}.gguf")
            write_base(given.of, bases[-1], kind)
        print("| base | exact | lowest p | certified | CPU s |\n|---|---|---|---|---|")
        for base in bases:
            report, cpu_s = measured(store, base, Path(temporary) / "served", given.at_once)
            print(line(base.name, report, cpu_s), flush=True)
            for one in report.adapters:
                for key, why in one.failed.items():
                    print(f"  {key!r}: {why}", flush=True)


if __name__ == "__main__":
    main()
