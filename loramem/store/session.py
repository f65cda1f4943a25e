"""The base model of a store and what works on it, loaded on first use: reading an index needs none of it."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from loramem import embedded
from loramem.errors import BaseModelNotFound
from loramem.index.index import Index
from loramem.models.dtypes import Dtype, DtypeChoice
from loramem.store.manifest import Manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loramem.models.adapters import AdaptedModel
    from loramem.models.base_model import BaseModel
    from loramem.store.planner import Planner
    from loramem.store.read import Reader
    from loramem.store.write import Transaction


@dataclass(frozen=True)
class ModelOptions:
    """The base model as the caller asked for it; what is not said is the store's."""

    name: str | None = None
    revision: str | None = None
    device: str = "auto"
    dtype: DtypeChoice = "auto"
    calibrate: bool | None = None
    """Whether the first plan calibrates a base model that nothing is known of; as the environment says if None."""


class Session:
    """Base model, reader and writer of one store."""

    def __init__(
        self, store: Path, index: Index, manifest: Manifest, options: ModelOptions, adapter_dtype: Dtype | None = None
    ) -> None:
        self.store, self.index, self.manifest, self._options = store, index, manifest, options
        self._adapter_dtype = adapter_dtype

        self._served = dict[Dtype, Session]()

    def served_in(self, dtype: Dtype) -> "Session":
        """The same store as a server in this dtype holds it: the base model loaded in it, adapters cast to it."""
        if dtype not in self._served:
            options = replace(self._options, dtype=dtype)
            self._served[dtype] = Session(self.store, self.index, self.manifest, options, dtype)
        return self._served[dtype]

    @cached_property
    def base(self) -> "BaseModel":
        """The base model, checked against the store's fingerprint, under the name it has in the store.

        Raises:
            OtherBaseModel: Another model, or the same with other weights, configuration or tokenizer.
            BaseModelNotFound: It cannot be loaded, or is not where it was.
        """
        from loramem.models.base_model import load_base_model

        manifest, options = self.manifest, self._options
        name, revision = self._named()
        base = load_base_model(
            name,
            revision=revision,
            device=options.device,
            dtype=manifest.dtype if options.dtype == "auto" else options.dtype,
        )
        base.check(manifest.fingerprint, manifest.dtype)
        return base.known_as(manifest.base_model, manifest.revision)

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The base model's, whose files are those of the store; its weights are hashed and not loaded.

        Raises what `base` raises.
        """
        from loramem.models.base_model import load_tokenizer

        if "base" in self.__dict__:
            return self.base.tokenizer
        name, revision = self._named()
        return load_tokenizer(name, revision, self.manifest.fingerprint)

    def _named(self) -> tuple[str, str | None]:
        """What the base model is found by here, and at which revision."""
        manifest, options = self.manifest, self._options
        name = options.name or manifest.place()
        return name, options.revision or (manifest.revision if name == manifest.base_model else None)

    def base_folder(self) -> Path | None:
        """Where the base model lies here, a folder or a GGUF file, as far as that can be told without loading or the
        network."""
        if "base" in self.__dict__:
            return self.base.folder
        try:
            name = self._options.name or self.manifest.place()
        except BaseModelNotFound:
            return None
        if name == embedded.NAME:
            return embedded.base_path()
        if (place := Path(name).expanduser()).exists():
            return place
        from huggingface_hub import try_to_load_from_cache

        revision = self.manifest.revision if name == self.manifest.base_model else None
        config = try_to_load_from_cache(name, "config.json", revision=self._options.revision or revision)
        return Path(config).parent if isinstance(config, str) else None

    @cached_property
    def adapted(self) -> "AdaptedModel":
        """The base model that adapters are attached to."""
        from loramem.models.adapters import AdaptedModel

        return AdaptedModel(self.base, adapter_dtype=self._adapter_dtype)

    @cached_property
    def reader(self) -> "Reader":
        """Decodes records."""
        from loramem.store.read import Reader

        return Reader(self.store, self.index, self.adapted, self.manifest.template())

    @cached_property
    def planner(self) -> "Planner":
        """Admits records and plans their adapters."""
        from loramem.store.planner import Planner

        options = self._options
        return Planner(self.index, self.manifest, self.adapted, calibrate=options.calibrate, device=options.device)

    @cached_property
    def transaction(self) -> "Transaction":
        """Writes records."""
        from loramem.store.write import Transaction

        def served(dtype: Dtype) -> "AdaptedModel":
            return self.served_in(dtype).adapted

        return Transaction(self.store, self.index, self.manifest, self.planner, served)
