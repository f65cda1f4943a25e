"""Where a base model lies: a name to a folder. No torch; the Hub's client is imported where a Hub id is asked for."""

import re
from pathlib import Path

from loramem import embedded
from loramem.errors import BaseModelNotFound, reason
from loramem.models.fingerprint import SUFFIX

# Everything a causal LM needs and nothing that could run code: no pickles, no Python files.
HUB_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt")
SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{40})$")
"""End of the path of a repository's commit in the Hub's cache."""
# The same weights once more in another vendor's layout, and folders of other formats: a pattern's * crosses "/".
HUB_IGNORED = ("consolidated*", "*/*")


def location_of(name: str) -> str | None:
    """The folder or GGUF file that a name is the path of; None if it is "loramem-tiny" or can only be a Hub id."""
    local = _expanded(name)
    return str(local.resolve()) if name != embedded.NAME and (local.is_dir() or is_gguf(local)) else None


def is_gguf(path: Path) -> bool:
    """Whether a base model at this path is one file of llama.cpp's format, by its name."""
    return path.suffix == SUFFIX and path.is_file()


def find_base_model(name: str, revision: str | None = None) -> tuple[Path, str, str | None]:
    """Folder or GGUF file, public identity and commit of a base model named by Hub id, place or "loramem-tiny".

    Raises:
        BaseModelNotFound: No such folder, and the Hub does not give it.
    """
    if name == embedded.NAME:
        return embedded.base_path(), name, None
    if (location := location_of(name)) is not None:
        if match := SNAPSHOT.search(location):
            return Path(location), match[1].replace("--", "/"), match[2]
        return _expanded(name), Path(location).name, None
    folder = _downloaded(name, revision)
    return folder, name, folder.name


def _downloaded(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is of the HTTP library it uses
        HTTPError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(HUB_PATTERNS), ignore_patterns=list(HUB_IGNORED)
            )
        )
    # The client lets through errors of its HTTP library, RuntimeError of downloads, what nonsense does to its parsers.
    except (HTTPError, OSError, ValueError, RuntimeError, KeyError) as error:
        if isinstance(error, LocalEntryNotFoundError) and _is_cached(name):  # offline, and a file is lacking
            raise BaseModelNotFound(_incomplete(name, revision)) from error
        raise BaseModelNotFound(
            f"Base model {name!r} is neither a local folder nor available from the Hub ({reason(error)})."
        ) from error


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~someone who is not a user here
        return Path(name)


def _is_cached(name: str) -> bool:
    """Whether some revision of a Hub repository was downloaded, in whole or in part."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cached = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"))
    return next(cached.glob("snapshots/*/*"), None) is not None


def lacking_files(name: str, commit: str | None) -> str:
    """What to do about a file that a model's folder does not have."""
    if commit is not None:
        from huggingface_hub import is_offline_mode

        if is_offline_mode():  # otherwise it was completed just now
            return _incomplete(name, commit)
    return "Give a folder with all of a model, its weights as safetensors: loramem never loads pickled ones."


def _incomplete(name: str, revision: str | None) -> str:
    where = f" at revision {revision}" if revision else ""
    return (
        f"The cached copy of {name}{where} is incomplete: go online once (HF_HUB_OFFLINE unset) and load it, which "
        "completes it."
    )
