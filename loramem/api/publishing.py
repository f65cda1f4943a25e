"""What leaves a store: checked and written for servers, copied, exported, pushed. The store stays as it is.

Torch is imported only once the base model is needed.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from loramem._util.choices import check_choice
from loramem.api.reading import Memory
from loramem.errors import StoreReadOnly
from loramem.models.dtypes import Dtype
from loramem.results import DeployReport, PushPlan, PushReport, ServerReport, ServingReport
from loramem.serving.check import check_store
from loramem.serving.targets import TARGETS, BaseType, Target
from loramem.store import copies


class Publishing(Memory):
    """A store that others are given, as a whole or as adapters."""

    def check(
        self,
        targets: Iterable[Target] = TARGETS,
        *,
        max_rank: int | None = None,
        base_name: str | None = None,
        dtype: Dtype | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> ServingReport:
        """Whether servers would take the adapters as they are, with the reason and remedy for each that they would not.

        Args:
            targets: Of "peft", "vllm", "sglang" and "llama.cpp".
            max_rank: The server's maximum, where it runs already.
            base_name: The model name or path that it is started with.
            dtype: Also decode every record with base model and adapters cast to "bfloat16" or "float16", as servers do.
            progress: Told how many records of how many were decoded.

        Raises:
            IntegrityError: An adapter's files are not what was committed.
            UnknownChoice: No such target or dtype.
        """
        with self._turn():
            return check_store(
                self._session, list(targets), max_rank=max_rank, base_name=base_name, dtype=dtype, progress=progress
            )

    def check_server(
        self,
        url: str,
        target: Target | None = None,
        *,
        at_once: int = 8,
        timeout_s: float = 60.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> ServerReport:
        """Ask the server that serves the adapters for every record, greedily, by prompt ids, and compare the answers.

        A bearer token is read from LORAMEM_API_KEY. Of the base model only the tokenizer is loaded.

        Args:
            url: Such as "http://localhost:8000".
            target: "vllm", "sglang" or "llama.cpp"; None asks the server what it is.
            at_once: Requests that are under way together.
            timeout_s: For one answer.
            progress: Told how many records of how many were asked.

        Raises:
            ServerError: It is not there, lacks an adapter, or gives something else than answers.
            StoreError: The store does not hold its keys.
            OtherBaseModel: The base model at hand is not the store's.
            UnknownChoice: No such target.
        """
        from loramem.serving.check_server import check_server

        if target is not None:
            check_choice("target", target, TARGETS)
        with self._turn():
            return check_server(self._session, url, target, at_once=at_once, timeout_s=timeout_s, progress=progress)

    def deploy(
        self,
        target: Target,
        folder: str | Path,
        *,
        base_name: str | None = None,
        pad_rank: int | None = None,
        dtype: Dtype = "float32",
        include_keys: bool = False,
        hash_keys: bool = False,
        base_type: BaseType | None = None,
    ) -> DeployReport:
        """Write a new folder of adapters that a server takes as it is, and how to start it; no keys, no values.

        Args:
            target: "peft", "vllm", "sglang" or "llama.cpp".
            base_name: What the server is started with; vLLM compares it with what the adapters say.
            pad_rank: One rank for all, padded with zeros, which keeps their function.
            dtype: Of the weights in the files.
            include_keys: Also write which adapter answers which key, with its prompt ids: this names the keys.
            hash_keys: Write it under salted digests of the keys instead: whoever knows a key finds its adapter.
            base_type: In which the embedded base model is written for llama.cpp; "F32" or "F16" by ``dtype`` if None.

        Raises:
            NotServable: The server would refuse the adapters, or serve something else; nothing was written.
            AdapterError: ``pad_rank`` is below the rank of an adapter.
            ArgumentError: A dtype that the target's files are not written in, or keys and their digests at once.
            LoramemError: For llama.cpp, the package `gguf` is not installed.
            StoreError: There is something at ``folder``, it lies in a store's folder, or the store is empty.
            IntegrityError: An adapter's files are not what was committed.
        """
        from loramem.serving.deploy import Deployment, deploy

        with self._turn():
            wanted = Deployment(target, base_name, pad_rank, dtype, include_keys, hash_keys, base_type)
            return deploy(self._session, Path(folder), wanted)

    def backup(self, target: str | Path) -> int:
        """Copy the store, while it may be written to, as it was committed at one moment; returns the bytes.

        Raises:
            StoreError: There is something at ``target``, or it lies in a store's folder.
            IntegrityError: A file is not what was committed: damage is not copied.
        """
        with self._turn():
            return copies.backup(self.path, self._index, Path(target))

    def export(self, target: str | Path) -> int:
        """Write the store to a new directory, or to one file if ``target`` ends in .tar; returns the bytes.

        The base model's folder on this machine and unfinished writes are left out. Whoever has it can read the keys,
        and the values with the base model at hand. Raises what `backup` raises.
        """
        with self._turn():
            return copies.export(self.path, self._index, Path(target))

    def push(
        self,
        repo: str,
        *,
        include_keys: bool = False,
        include_values: bool = False,
        public: bool = False,
        replace: bool = False,
        license: str = "other",
        message: str | None = None,
        confirm: Callable[[PushPlan], None] | None = None,
    ) -> PushReport:
        """Publish the live records on the Hub: their adapters, what was proved of them, and a card.

        One commit on a pinned parent; only adapters that the repository does not have are uploaded. The token is the
        one of the environment or of ``hf auth login``. Whoever may read the repository can extract the values, by
        asking for keys.

        Args:
            repo: "me/facts". Made, private unless ``public``, if there is none.
            include_keys: Publish keys and namespaces as text; salted digests of them otherwise, by which whoever knows
                a key finds its record.
            include_values: Publish values and metadata as text; salted digests of the values otherwise.
            public: Allow a public repository.
            replace: Build on what the repository holds even if this store does not know it.
            license: Identifier for the card.
            message: Of the commit.
            confirm: Called with what would be sent, before anything is; what it raises ends the push.

        Raises:
            PublicRepository: It is public, and ``public`` is False.
            HubConflict: Somebody else has committed to it; nothing was changed there.
            HubOffline, HubAccess, HubError: The Hub cannot be asked, or says no.
            IntegrityError: The store is damaged; nothing was sent.
            DeletedInWeights: Adapters still hold records that were deleted or replaced: compact first.
            StoreReadOnly: The commit could not be noted.
            StoreError: The store does not hold the keys or values that are to be published.
            ArgumentError: Values without keys.
        """
        from loramem.hub.push import push

        if self._index.read_only:
            raise StoreReadOnly(f"{self.path} cannot be written, and a push is noted in it. Copy it.")
        with self._turn():
            return push(
                self.path,
                self._index,
                self.manifest,
                repo,
                include_keys=include_keys,
                include_values=include_values,
                public=public,
                replace=replace,
                license=license,
                message=message,
                confirm=confirm,
            )
