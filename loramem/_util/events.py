"""What happens to a store, as log records with fields: ``record.event`` is the name, every fact an attribute.

Facts are counts, ids of adapters and times. Keys and values are never among them.
"""

import logging

log = logging.getLogger("loramem._util.events")

NAMES = (
    "journalled",
    "trained",
    "installed",
    "committed",
    "cleaned",
    "deleted",
    "compacted",
    "forgotten",
    "collected",
    "repaired",
    "vacuumed",
)
"""Of changes to a store."""
HUB = ("pushed", "pulled")


def log_event(event: str, **facts: object) -> None:
    """Log an event at level INFO."""
    assert event in NAMES + HUB
    shown = " ".join(f"{name}={value}" for name, value in facts.items())
    log.info("%s %s", event, shown, extra={"event": event, "facts": facts})
