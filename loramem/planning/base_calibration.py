"""What a base model that nobody calibrated can be told of in a minute: the law of random tokens where writes begin.

1. Features of one sample of each kind are collected once. A shorter length is a prefix of it, so that its points share
   them, and so do the ranks of one length.
2. A point (rank, length) is a run to convergence over features (`loramem.planning.feature_runs`). At each length
   ranks go upwards until one is certified: those that end above 0.69 nats are points of the law, and all of them are
   outcomes for the success boundary.
3. Random tokens give the law that ranks are chosen by (`loramem.planning.rank_law`). Phone numbers say what they cost,
   and are outcomes with few different tokens.
4. Every point is appended to the file of runs as it is done. A calibration that time cut short says so, and goes on at
   the next plan.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

from loramem._util.out_of_memory import is_out_of_memory
from loramem.errors import LoramemError, UnsupportedBaseModel
from loramem.models.adapters import AdaptedModel
from loramem.models.features import Features
from loramem.models.placement import Placement
from loramem.planning import calibration
from loramem.planning.calibrate import bare_calibration, base_conditions, encode_sample
from loramem.planning.calibration import Calibration, cached, summarise
from loramem.planning.feature_samples import CONDITIONS, FeatureSample
from loramem.planning.runs import LAW_OBJECTIVE, Run, append_run, default_file, identity, read_runs, shipped_file
from loramem.records.prompts import EncodedRecord
from loramem.training.shard_training import NOT_UNDERSTOOD, features_of

log = logging.getLogger(__name__)

BUDGET_S = 90.0
"""Of all points and their features: no point is begun that would probably end later."""
FIRST_POINTS = 3
"""That are made whatever the ones before them took, as long as the budget is not spent."""
FEATURE_SHARE = 0.4
"""Of the budget, for collecting features."""
FILLS = {"random": (0.0, 0.22, 0.1, 1 / 22, 0.5, 1.0), "phonebook": (0.1, 0.5)}
"""Answer tokens by the mean width of the adapted module, in the order in which points are made: a range, what lies
within it, and what lies beyond. Every random token is another; all phone numbers ask for eleven."""
RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
MIN_TOKENS = 10
"""About as many as there are digits: the law has to reach down to them."""
SWITCH = "LORAMEM_CALIBRATE"
"""Environment variable: 1 calibrates base models at their first write or plan."""


def is_wanted(calibrate: bool | None) -> bool:
    """What was asked for, or else what the environment says; no unless told otherwise."""
    return os.environ.get(SWITCH, "0") in ("1", "true", "yes") if calibrate is None else calibrate


def known_of(adapted: AdaptedModel, *, calibrate: bool | None = None) -> Calibration | None:
    """What is known of a base model, after a calibration where that is nothing.

    A calibration that fails is logged, and leaves plans the guess that they make without one. Only exhausted memory is
    raised.

    Args:
        calibrate: See `is_wanted`.
    """
    base = adapted.base
    known = calibration.load(base.fingerprint.weights[:12])
    if (known is not None and known.complete) or not is_wanted(calibrate):
        return known
    log.warning(
        "%s is calibrated%s, once, in about %.0f s at most; --no-calibrate leaves that out",
        *(base.id, "" if known is None else " further", BUDGET_S),
    )
    try:
        return calibrate_base(adapted)
    except (LoramemError, OSError, *NOT_UNDERSTOOD) as error:
        if is_out_of_memory(error):
            raise
        log.warning("%s could not be calibrated (%s): its ranks remain a guess", base.id, error)
    bare = bare_calibration(base)  # known not to be calibrated: the next write does not try again
    try:
        bare.save(cached(bare.base_weights))
    except OSError as error:
        log.warning("that was not kept: %s", error)
    return bare


def calibrate_base(adapted: AdaptedModel, runs: Path | None = None, *, budget_s: float = BUDGET_S) -> Calibration:
    """Make the points that ``runs`` does not hold yet, and keep what they say in the user's cache.

    Args:
        runs: JSON lines; the user's cache unless given.

    Raises what `calibrated` raises.

    Raises:
        OSError: The cache cannot be written.
    """
    out = runs or default_file()
    known = (*read_runs(shipped_file()), *read_runs(out))
    return keep(calibrated(adapted, known, partial(append_run, out), budget_s=budget_s))


def keep(found: Calibration) -> Calibration:
    """The same, kept in the user's cache."""
    found.save(cached(found.base_weights))
    return found


def calibrated(
    adapted: AdaptedModel, before: Iterable[Run], made: Callable[[Run], None], *, budget_s: float = BUDGET_S
) -> Calibration:
    """Make the points that were not made before, and say what all of them say.

    Args:
        made: Gets each as it is done.

    Raises:
        UnsupportedBaseModel: No adapter of this model sits behind its last attention.
        RecordError: The tokenizer cannot express a kind of data, and neither the other.
    """
    started, cut_short = time.monotonic(), False
    base, placement = adapted.base, adapted.ladder[0]
    if len(adapted.ladder) == 1:
        raise UnsupportedBaseModel(f"{type(base.model).__name__} has no placement behind its last attention.")
    samples = _samples(adapted, placement, FEATURE_SHARE * budget_s / len(FILLS))
    known = {run.identity: run for run in before}
    conditions = {**base_conditions(base), "objective": LAW_OBJECTIVE, **CONDITIONS}
    paces = list[float]()  # seconds per position of the points that were made
    for sample, length in _in_turn(samples):
        prefix = sample.prefix(length)
        for rank in RANKS:
            name = identity(sample.kind, rank, prefix.length, 0, placement.modules, placement.layers, conditions)
            if name not in known:
                # A process may be held up for a while: one point alone says little of the next.
                pace = median(paces) if len(paces) >= FIRST_POINTS else 0.0
                if time.monotonic() - started + pace * len(prefix.features) > budget_s:
                    log.info("no time left for rank %d of %d tokens of %s", rank, prefix.length, sample.kind)
                    cut_short = True
                    break
                known[name] = run = prefix.run(adapted, rank, placement, conditions)
                made(run)
                paces.append(run.elapsed_s / len(prefix.features))
                log.info(
                    "%s, rank %d, %d tokens: %.2f to %.2f nats per token, %.1f s",
                    *(run.kind, rank, run.length, run.base_loss, run.final_loss, run.elapsed_s),
                )
            if known[name].certified:
                break
    log.info("%s is calibrated: %d points in %.0f s", base.id, len(paces), time.monotonic() - started)
    return replace(summarise(bare_calibration(base), known.values()), complete=not cut_short)


def _samples(adapted: AdaptedModel, placement: Placement, budget_s: float) -> list[tuple[FeatureSample, Sequence[int]]]:
    """Of every kind, as long as the base's context and ``budget_s`` seconds of frozen passes allow, with the lengths
    that points are made of, in their order."""
    width, refused = placement.size(adapted.model).width, None
    found = list[tuple[FeatureSample, Sequence[int]]]()
    for kind, fills in FILLS.items():
        lengths = list(dict.fromkeys(max(MIN_TOKENS, round(fill * width)) for fill in fills))
        if kind != "phonebook":  # one text, which the context has to hold
            lengths = [length for length in lengths if length <= adapted.base.max_tokens // 2]
        try:
            records = encode_sample(adapted.base, kind, max(lengths), 0)
        except LoramemError as error:  # a tokenizer may not give random tokens back
            log.info("%s is not calibrated: %s", kind, error)
            refused = error
            continue
        records, features = _collect(adapted, records, placement, budget_s)
        sample = FeatureSample.of(adapted, kind, records, features)
        found.append((sample, [length for length in lengths if length <= sample.length] or [sample.length]))
    if not found and refused is not None:
        raise refused
    return found


def _collect(
    adapted: AdaptedModel, records: list[EncodedRecord], placement: Placement, budget_s: float
) -> tuple[list[EncodedRecord], Features]:
    """Features of as many of the records as there is time for, twice as many at a time."""
    started, parts, done = time.monotonic(), list[Features](), 0
    while done < len(records):
        until = min(len(records), max(8, 2 * done))
        elapsed = time.monotonic() - started
        if done and elapsed * until / done > budget_s:
            break
        part = features_of([adapted], records[done:until], placement)
        if part is None:
            raise UnsupportedBaseModel(f"{type(adapted.model).__name__} is not run from its last attention on.")
        parts.append(part[0].to(adapted.model.dtype))
        done = until
    return records[:done], Features.joined(parts)


def _in_turn(
    samples: Sequence[tuple[FeatureSample, Sequence[int]]],
) -> Iterator[tuple[FeatureSample, int]]:
    """The lengths of all kinds: the first of each, then the second."""
    for place in range(max((len(lengths) for _, lengths in samples), default=0)):
        yield from ((sample, lengths[place]) for sample, lengths in samples if place < len(lengths))
