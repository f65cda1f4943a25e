"""The Hub as loramem sees it: a repository's files at a commit, and what huggingface_hub raises as our errors.

The token is the one of the environment or of ``hf auth login``; nothing here takes or keeps one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from json import JSONDecodeError

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is of the HTTP library it uses
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo, RepoFile

from loramem.errors import HubAccess, HubConflict, HubError, HubOffline, LoramemError

_LOGIN = "Log in with hf auth login, or set HF_TOKEN"


@contextmanager
def hub(repo: str) -> Iterator[HfApi]:
    """A client for what is done with one repository.

    Raises:
        HubOffline: HF_HUB_OFFLINE is set: before anything is asked.
        HubAccess: No such repository or revision for this token, or no right to do this.
        HubConflict: Somebody else was faster.
        HubError: No repository has such a name; or the Hub cannot be reached, broke off, or failed five times.
    """
    if constants.is_offline_mode():
        raise _offline(repo)
    try:
        yield HfApi(library_name="loramem", library_version=version("loramem"))
    except LoramemError:
        raise
    except OfflineModeIsEnabled:
        raise _offline(repo) from None
    except HFValidationError as error:
        raise HubError(f"{repo!r} is not the name of a repository ({_line(error)}).", repo=repo) from None
    except (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError) as error:
        raise HubAccess(
            f"{repo}: the Hub shows no such thing here ({_line(error)}). {_LOGIN}, if it is private.", repo=repo
        ) from None
    except HfHubHTTPError as error:
        raise _refusal(repo, error) from None
    # The client lets through errors of its HTTP library, RuntimeError of uploads, what nonsense does to its parsers.
    except (HTTPError, OSError, RuntimeError, KeyError, JSONDecodeError) as error:
        raise HubError(
            f"{repo}: the Hub cannot be reached, or broke off ({_line(error)}). Try again.", repo=repo
        ) from None
    except ValueError as error:  # such as a card that the Hub does not take, with the reason in a later line
        raise HubError(f"{repo}: refused on the way ({' '.join(str(error).split())}).", repo=repo) from None


def repository(api: HfApi, repo: str) -> ModelInfo | None:
    """What the Hub says of a repository; None if this token sees none."""
    try:
        return api.model_info(repo)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None


def files_at(api: HfApi, repo: str, commit: str | None) -> dict[str, RepoFile]:
    """A repository's files at a commit, by path, as the Hub lists them."""
    entries = api.list_repo_tree(repo, recursive=True, revision=commit)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _refusal(repo: str, error: HfHubHTTPError) -> HubError:
    status, moved = error.response.status_code, {"repo": repo, "expected": None, "got": None}
    if status == 412:
        return HubConflict(
            f"{repo}: somebody else committed while this push was under way; nothing was changed. Pull it into a new "
            "folder and go on from there.",
            **moved,  # type: ignore[arg-type]
        )
    if status == 409:
        return HubConflict(f"{repo}: somebody else made it just now; nothing was pushed. Try again.", **moved)  # type: ignore[arg-type]
    if status in (401, 403):
        return HubAccess(f"{repo}: this needs a token that may do it ({_line(error)}). {_LOGIN}.", repo=repo)
    return HubError(f"{repo}: the Hub answered {status} ({_line(error)}). Try again later.", repo=repo)


def _offline(repo: str) -> HubOffline:
    return HubOffline(f"{repo} is on the Hub, and HF_HUB_OFFLINE forbids to ask it. Unset it.", repo=repo)


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
