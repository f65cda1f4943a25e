"""The command lines that measure results again, found by asking the suite which cells every likely request has."""

import json
import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from loramem import embedded
from loramem.suites.runner import Request, Result, Suite, load_suite

SIZES = ("records", "length")
"""The fields of a cell that ``--records`` sets."""


def commands(name: str, lines: Sequence[Result]) -> tuple[str, ...]:
    """As few command lines as have all these cells, with as few other cells and options as can be.

    If no request has any of them, as for a store that lies elsewhere, it is the suite's own sizes and seeds.

    Args:
        name: The suite's.
        lines: Measured under the same conditions; at least one.
    """
    results = {_key(line["cell"]): line["result"] for line in lines}
    requests = {request: _cells(load_suite(name), request, results) for request in _requests(lines)}
    made: list[Request] = []
    left = set(results)
    while left:
        best = min(requests, key=lambda one: (-len(requests[one] & left), len(requests[one]), len(_options(one))))
        if left.isdisjoint(requests[best]):
            break
        made.append(best)
        left -= requests[best]
    made = made or [next(iter(requests))]
    return tuple(shlex.join(["loramem", "suite", "run", name, *_options(request)]) for request in made)


def _requests(lines: Sequence[Result]) -> Iterator[Request]:
    """What may have been asked for: of each device and store the sizes and seeds that there are, or the suite's own."""
    conditions = lines[0]["conditions"]
    places: dict[tuple[str, str | None], list[Mapping[str, Any]]] = {}
    for cell in (line["cell"] for line in lines):
        places.setdefault((cell.get("device", "auto"), cell.get("store")), []).append(cell)
    for (device, store), cells in places.items():
        sizes = tuple(sorted({cell[name] for cell in cells for name in SIZES if cell.get(name) is not None}))
        seeds = len({cell["seed"] for cell in cells if "seed" in cell})
        for records, number, every_record, quick in product(
            (None, sizes or None), (None, seeds or None), (False, True), (False, True)
        ):
            yield Request(
                records=records,
                seeds=number,
                model=conditions.get("base_model", embedded.NAME),
                device=device,
                threads=conditions.get("threads", 1),
                quick=quick,
                store=None if store is None else Path(store),
                every_record=every_record,
            )


def _cells(suite: Suite, request: Request, results: Mapping[str, Result]) -> frozenset[str]:
    """The cells of a request; those that follow from a result which is missing, as if it were nothing but zeros."""

    def known(cell: Any) -> Result:
        return results.get(_key(cell.identity)) or defaultdict(int)

    return frozenset(_key(cell.identity) for cell in suite.cells(request, known))


def _key(identity: Mapping[str, Any]) -> str:
    return json.dumps(dict(identity), sort_keys=True)


def _options(request: Request) -> tuple[str, ...]:
    options = ["--threads", str(request.threads)]
    options += [] if request.model == embedded.NAME else ["--model", request.model]
    options += [] if request.device == "auto" else ["--device", request.device]
    options += [] if request.records is None else ["--records", ",".join(map(str, request.records))]
    options += [] if request.seeds is None else ["--seeds", str(request.seeds)]
    options += [] if request.store is None else ["--store", str(request.store)]
    return (*options, *["--all"] * request.every_record, *["--quick"] * request.quick)
