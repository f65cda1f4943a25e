"""Which adapters an interrupted verify had found whole, so that the next one need not decode them: in the user's cache.

What was found holds for a state: of the index, the base model, the device and the libraries that decode. Files of
adapters are no part of it, since every verify hashes them all. No keys and no values are kept.
"""

import hashlib
import json
import logging
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from loramem._util.cache import cache_folder
from loramem.models.base_model import BaseModel
from loramem.models.fingerprint import Fingerprint
from loramem.store.manifest import Manifest

log = logging.getLogger(__name__)

DECODERS = ("loramem", "peft", "torch", "transformers")


class VerifyProgress:
    """The adapters of one store that came out whole in one state.

    Every line of the file names its state, so that runs in several states cannot be mistaken for each other.
    """

    def __init__(self, store: Path, state: str) -> None:
        name = hashlib.sha256(str(store.resolve()).encode()).hexdigest()[:32]
        self.path, self.state = cache_folder() / "verify" / name, state

    def adapters(self) -> frozenset[str]:
        """Those noted before; one whose line was cut off is verified again."""
        try:
            lines = self.path.read_text().split("\n")[:-1]
        except (OSError, ValueError):  # absent or damaged: it is only a cache
            return frozenset()
        return frozenset(line.removeprefix(f"{self.state} ") for line in lines if line.startswith(f"{self.state} "))

    def note(self, adapter: str) -> None:
        """Keep that an adapter's files are as committed and every record in it was decoded."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(f"{self.state} {adapter}\n")
        except OSError:
            log.debug("%s is not writable: an interrupted verify begins again", self.path)

    def forget(self) -> None:
        """The next verify begins again."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError:
            log.debug("%s cannot be removed", self.path)


def state_of(rows_sum: str, manifest: Manifest, base: BaseModel, found: Fingerprint, device: str) -> str:
    """Hash of everything, files of adapters apart, that decides what verifying an adapter comes to.

    Args:
        rows_sum: The sum over the seals of all rows of the index.
        found: Of the base model, as hashed just now.
        device: What decodes.
    """
    content = {
        "manifest": manifest.sha256,
        "rows": rows_sum,
        "base": asdict(found),
        "dtype": base.dtype,
        "device": device,
        "versions": {name: version(name) for name in DECODERS},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
