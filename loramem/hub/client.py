"""The Hub as loramem sees it: single requests for one repository, and what they raise as our errors.

Each request is wrapped alone, so that a bug of ours around it, or a disk that is full, is never taken for the Hub's
doing. The token is the one of the environment or of ``hf auth login``; nothing here takes or keeps one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from json import JSONDecodeError
from pathlib import Path
from socket import gaierror
from ssl import SSLError

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is of the HTTP library it uses
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo, RepoFile

from loramem.errors import HubAccess, HubConflict, HubError, HubOffline

_LOGIN = "Log in with hf auth login, or set HF_TOKEN"
_OF_THE_NETWORK = (
    ConnectionError,
    TimeoutError,
    HTTPError,
    LocalEntryNotFoundError,
    FileMetadataError,
    gaierror,
    SSLError,
)
"""OSErrors that are the Hub's or the way's to it; another one with a number is of a file here."""


class Hub:
    """One repository of the Hub, asked with a client of its own.

    Raises:
        OSError: A disk here does not take or give a file.
        HubOffline: HF_HUB_OFFLINE is set: before anything is asked.
        HubAccess: No such repository or revision for this token, or no right to do this.
        HubConflict: Somebody else was faster.
        HubError: No repository has such a name; or the Hub cannot be reached, broke off, or failed five times.
    """

    def __init__(self, repo: str) -> None:
        self.repo = repo
        if constants.is_offline_mode():
            raise _offline(repo)
        self._api = HfApi(library_name="loramem", library_version=version("loramem"))

    def info(self, revision: str | None = None) -> ModelInfo:
        """What the Hub says of the repository."""
        with _asked(self.repo):
            return self._api.model_info(self.repo, revision=revision)

    def info_if_there(self) -> ModelInfo | None:
        """The same; None if this token sees no such repository."""
        with _asked(self.repo):
            try:
                return self._api.model_info(self.repo)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                return None

    def files(self, commit: str | None) -> dict[str, RepoFile]:
        """The repository's files at a commit, by path, as the Hub lists them."""
        with _asked(self.repo):  # the listing comes in pages, each asked for when the one before is used up
            entries = list(self._api.list_repo_tree(self.repo, recursive=True, revision=commit))
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def download(self, path: str, commit: str | None, folder: Path) -> Path:
        """A file of the repository at a commit, put into a folder; returns where it lies."""
        with _asked(self.repo):
            return Path(self._api.hf_hub_download(self.repo, path, revision=commit, local_dir=folder))

    def create(self, *, private: bool) -> None:
        """Make the repository."""
        with _asked(self.repo):
            self._api.create_repo(self.repo, private=private)

    def commit(
        self, operations: Sequence[CommitOperationAdd | CommitOperationDelete], message: str, parent: str | None
    ) -> str:
        """Commit on a parent that must still be the last one; returns the new commit."""
        with _asked(self.repo):
            done = self._api.create_commit(self.repo, list(operations), commit_message=message, parent_commit=parent)
            return str(done.oid)


@contextmanager
def _asked(repo: str) -> Iterator[None]:
    """What one call of the client raises, as our errors; nothing of ours may run in here."""
    try:
        yield
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
        if (local := _of_the_disk(error)) is not None:
            raise local from None
        raise HubError(
            f"{repo}: the Hub cannot be reached, or broke off ({_line(error)}). Try again.", repo=repo
        ) from None
    except ValueError as error:  # such as a card that the Hub does not take, with the reason in a later line
        raise HubError(f"{repo}: refused on the way ({' '.join(str(error).split())}).", repo=repo) from None


def _of_the_disk(error: BaseException) -> OSError | None:
    """What a file here failed with, be it the error itself or what an upload's RuntimeError was raised from."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return _of_the_disk(error.__cause__)
    if isinstance(error, OSError) and not isinstance(error, _OF_THE_NETWORK) and error.errno is not None:
        return error
    return None


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
