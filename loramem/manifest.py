"""store.json: what a store was created with and never changes."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loramem.errors import StoreFormatError
from loramem.files import write_synced

FORMAT = 1
NAME = "store.json"


@dataclass(frozen=True)
class Manifest:
    """The base model, prompt, placement and thresholds of a store."""

    base_model: str
    """Hub id, "loramem-tiny", or a local folder's last name."""
    location: str | None
    """Where a local base model was found; None for Hub models and the embedded one. Never leaves the store."""
    revision: str | None
    fingerprint: dict[str, str]
    dtype: str
    prompt: dict[str, Any]
    """Fields of `loramem.prompts.PromptTemplate`."""
    placement: dict[str, Any]
    """Fields of `loramem.adapters.Placement`."""
    train_threshold: float
    certify_threshold: float

    def to_bytes(self) -> bytes:
        return (json.dumps({"format": FORMAT, **asdict(self)}, indent=2, sort_keys=True) + "\n").encode()

    def save(self, store: Path) -> None:
        write_synced(store / NAME, self.to_bytes())

    @classmethod
    def from_bytes(cls, content: bytes, store: Path) -> "Manifest":
        """Parse store.json.

        Raises:
            StoreFormatError: Not JSON, a field missing or unknown, or a format this version does not read.
        """
        try:
            fields = json.loads(content)
            found = fields.pop("format")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise StoreFormatError(f"{store / NAME} is damaged: it is not a loramem manifest.") from None
        if found != FORMAT:
            raise StoreFormatError(
                f"{store} has store format {found}; this version of loramem reads format {FORMAT}. Upgrade loramem."
            )
        try:
            return cls(**fields)
        except TypeError:
            raise StoreFormatError(f"{store / NAME} is damaged: its fields are {', '.join(sorted(fields))}.") from None
