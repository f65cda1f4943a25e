"""The base model of a store and what works on it, loaded on first use: reading an index needs none of it."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from loramem.errors import OtherBaseModel
from loramem.index import Index
from loramem.manifest import Manifest

if TYPE_CHECKING:
    from loramem.adapters import AdaptedModel
    from loramem.base_model import BaseModel
    from loramem.reader import Reader
    from loramem.transaction import Transaction


@dataclass(frozen=True)
class ModelRequest:
    """The base model as the caller asked for it; what is not said is the store's."""

    name: str | None = None
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"


class Engine:
    """Base model, reader and writer of one store."""

    def __init__(
        self, store: Path, index: Index, manifest: Manifest, request: ModelRequest, adapter_dtype: str | None = None
    ) -> None:
        self.store, self.index, self.manifest, self._request = store, index, manifest, request
        self._adapter_dtype = adapter_dtype

    def served_in(self, dtype: str) -> "Engine":
        """The same store as a server in this dtype holds it: the base model loaded in it, adapters cast to it."""
        return Engine(self.store, self.index, self.manifest, replace(self._request, dtype=dtype), dtype)

    @cached_property
    def base(self) -> "BaseModel":
        """The base model, checked against the store's fingerprint.

        Raises:
            OtherBaseModel: Another model, or the same with other weights, configuration or tokenizer.
            BaseModelNotFound: It cannot be loaded.
        """
        from loramem.base_model import load_base_model

        manifest, request = self.manifest, self._request
        base = load_base_model(
            request.name or manifest.location or manifest.base_model,
            revision=request.revision or manifest.revision,
            device=request.device,
            dtype=manifest.dtype if request.dtype == "auto" else request.dtype,
        )
        if base.id != manifest.base_model:
            raise OtherBaseModel(
                f"The store was written with base model {manifest.base_model!r}, not {base.id!r}. Adapters only "
                "work on their own base: leave --model out, or write a new store.",
                expected=manifest.base_model,
                got=base.id,
            )
        base.fingerprint.check(manifest.fingerprint, base.id)
        return base

    @cached_property
    def adapted(self) -> "AdaptedModel":
        """The base model that adapters are attached to."""
        from loramem.adapters import AdaptedModel

        return AdaptedModel(self.base, adapter_dtype=self._adapter_dtype)

    @cached_property
    def reader(self) -> "Reader":
        """Decodes records."""
        from loramem.reader import Reader

        return Reader(self.store, self.index, self.adapted, self.manifest.template())

    @cached_property
    def transaction(self) -> "Transaction":
        """Writes records."""
        from loramem.transaction import Transaction

        return Transaction(self.store, self.index, self.manifest, self.adapted)
