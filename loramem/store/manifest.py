"""store.json: what a store was created with and never changes."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramem import embedded
from loramem._util.files import write_synced
from loramem.errors import BaseModelNotFound, IntegrityError, StoreFormatError
from loramem.index.index import Index
from loramem.models.dtypes import Dtype

if TYPE_CHECKING:
    from loramem.models.base_model import BaseModel
    from loramem.models.placement import Placement
    from loramem.records.prompts import PromptTemplate

FORMAT = 1
NEEDS = "0.1.0"
"""The first version of loramem that reads this format; what an older one tells its user to get."""
NAME = "store.json"
SERVE: tuple[Dtype, ...] = ("bfloat16",)
"""What servers cast to unless told otherwise."""


@dataclass(frozen=True)
class Manifest:
    """The base model, prompt, placement and thresholds of a store."""

    base_model: str
    """Hub id, "loramem-tiny", or the last name of a local folder or GGUF file."""
    location: str | None
    """Where a local base model was found; None for Hub models and the embedded one. Never leaves the store."""
    revision: str | None
    fingerprint: dict[str, str]
    dtype: Dtype
    prompt: dict[str, Any]
    """Fields of `loramem.records.prompts.PromptTemplate`."""
    placement: dict[str, Any]
    """Fields of `loramem.models.placement.Placement`."""
    train_threshold: float
    certify_threshold: float
    serve: tuple[Dtype, ...] = ()
    """Dtypes beside its own in which every write is proved as well."""
    keep_values: bool = True
    """Whether the index holds the values, or only salted digests of them."""
    key_salt: str | None = None
    """Of the digests that stand for namespaces and keys; None where the index has them as they are."""

    def to_bytes(self) -> bytes:
        fields = {"format": FORMAT, "needs": NEEDS, **asdict(self)}
        return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def save(self, store: Path) -> None:
        write_synced(store / NAME, self.to_bytes())

    def place(self) -> str:
        """What `load_base_model` finds the base model by, if it still lies where it was.

        Raises:
            BaseModelNotFound: It was a folder, which is not there, and nobody but the caller knows the new one.
        """
        if self.location is not None and Path(self.location).exists():
            return self.location
        local = self.revision is None and (self.base_model != embedded.NAME or self.location is not None)
        if not local:
            return self.base_model
        give = "--model (LORAMEM_MODEL; base_model in Python)"
        if self.location is not None:
            raise BaseModelNotFound(
                f"Base model {self.base_model!r} is gone from {self.location}. Give its new place with {give}."
            )
        raise BaseModelNotFound(
            f"The store does not say where its base model {self.base_model!r} lies: it comes from elsewhere, where "
            f"that was a folder. Give its place here with {give}."
        )

    def template(self) -> "PromptTemplate":
        """How keys become prompts."""
        from loramem.records.prompts import PromptTemplate

        stored = self.prompt
        return PromptTemplate(
            tuple(stored["prefix_ids"]), tuple(stored["suffix_ids"]), stored["end_id"], stored["kind"]
        )

    def placed(self) -> "Placement":
        """Where the store's adapters sit."""
        from loramem.models.placement import Placement

        return Placement(tuple(self.placement["modules"]), tuple(self.placement["layers"]))

    @classmethod
    def of(cls, base: "BaseModel", *, serve: Sequence[Dtype] | None = None, keep_values: bool = True) -> "Manifest":
        """The manifest of a new store for a loaded base model.

        Args:
            serve: Dtypes that its adapters will be served in; bfloat16 unless said.

        Raises:
            UnsupportedBaseModel: Unknown dtype.
        """
        from loramem.models.base_model import check_dtype
        from loramem.models.placement import Placement
        from loramem.training.settings import WriterSettings

        for dtype in serve or ():
            check_dtype(dtype)
        template, placement = base.template, Placement.ladder(base.model)[0]
        return cls(
            base_model=base.id,
            location=base.location if base.location != base.id else None,
            revision=base.revision,
            fingerprint=asdict(base.fingerprint),
            dtype=base.dtype,
            prompt={
                "prefix_ids": list(template.prefix_ids),
                "suffix_ids": list(template.suffix_ids),
                "end_id": template.end_id,
                "kind": template.kind,
            },
            placement={"modules": list(placement.modules), "layers": list(placement.layers)},
            train_threshold=WriterSettings.train_threshold,
            certify_threshold=WriterSettings.certify_threshold,
            serve=tuple(dtype for dtype in dict.fromkeys(SERVE if serve is None else serve) if dtype != base.dtype),
            keep_values=keep_values,
        )

    @classmethod
    def from_bytes(cls, content: bytes, store: Path) -> "Manifest":
        """Parse store.json.

        Raises:
            StoreFormatError: Not JSON, a field missing or unknown, or a format this version does not read.
        """
        try:
            fields = json.loads(content)
            found, needs = fields.pop("format"), fields.pop("needs", None)
        except (ValueError, KeyError, AttributeError, TypeError):
            raise StoreFormatError(f"{store / NAME} is damaged: it is not a loramem manifest.") from None
        if found != FORMAT:
            version = f" to {needs} or later" if needs else ""
            raise StoreFormatError(
                f"{store} has store format {found}; this version of loramem reads format {FORMAT}. Upgrade "
                f"loramem{version}."
            )
        try:
            return cls(**{**fields, "serve": tuple(fields.get("serve", ()))})
        except TypeError:
            raise StoreFormatError(f"{store / NAME} is damaged: its fields are {', '.join(sorted(fields))}.") from None


def read_manifest(store: Path, index: Index) -> Manifest:
    """The manifest of an existing store, checked against the digest its index holds.

    Raises:
        StoreFormatError: See `Manifest.from_bytes`.
        IntegrityError: store.json is not what was committed.
    """
    content = (store / NAME).read_bytes()
    manifest = Manifest.from_bytes(content, store)
    if index.meta("manifest_sha256") != hashlib.sha256(content).hexdigest():
        raise IntegrityError(f"{store / NAME} is not what was committed. Restore it from a backup.", what=NAME)
    return manifest
