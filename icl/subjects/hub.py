"""Files of repositories on the Hugging Face Hub, downloaded once into its cache (extra `[hub]`)."""

import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from icl.checkpoints import CheckpointError
from icl.config import ConfigError
from icl.subjects.language_checkpoints import INNER, by_step, of_step

Result = TypeVar("Result")
_log = logging.getLogger(__name__)


def hub_file(repository: str, name: str, revision: str | None = None) -> Path:
    """A file of a repository, on this machine; what was downloaded before is not asked for again.

    Raises:
        ConfigError: no package huggingface_hub, no such repository, revision or file, or no answer.
    """
    hub = _hub()
    return Path(
        _asked(lambda: hub.hf_hub_download(repository, name, revision=revision), f"{repository}/{name}", revision)
    )


class HubCheckpoints:
    """The checkpoints of a repository at one revision, such as `timaeus/L2W256-3m-rr`.

    Its files are `checkpoints/checkpoint_0000100.pth`, or the same at its top.

    The revision is resolved to a commit when the files are listed, so that all checkpoints are of one commit. Without an answer from the
    Hub, what the cache holds of the revision is used, with a note in the log.

    Args:
        repository: owner/name.
        revision: branch, tag or commit; None: main.
    """

    def __init__(self, repository: str, revision: str | None = None) -> None:
        self._repository, self._revision = repository, revision

    @cached_property
    def _listed(self) -> tuple[str | None, dict[int, Path]]:
        """The commit, and step -> name of the file in the repository."""
        hub = _hub()
        try:
            info = _asked(
                lambda: hub.HfApi().repo_info(self._repository, revision=self._revision),
                self._repository,
                self._revision,
            )
        except _Unreachable as error:
            cached = self._cached()
            if cached is None:
                raise ConfigError(f"{error}; once it was downloaded it will be found in the cache") from None
            _log.warning("%s; the checkpoints in the cache are used", error)
            commit, names = cached
        else:
            commit, names = info.sha, [each.rfilename for each in info.siblings or []]
        paths = [Path(name) for name in names]
        found = by_step([path for path in paths if str(path.parent) == INNER])
        found = found or by_step([path for path in paths if str(path.parent) == "."])
        if not found:
            raise CheckpointError(f"{self._repository} holds no file such as {INNER}/checkpoint_0000100.pth")
        return commit, found

    def steps(self) -> list[int]:
        """The steps that there are, ascending."""
        return sorted(self._listed[1])

    def path(self, step: int) -> Path:
        """The file of a step, downloaded where it is not in the cache.

        Raises:
            CheckpointError: there is none.
            ConfigError: see `hub_file`.
        """
        commit, found = self._listed
        return hub_file(self._repository, of_step(found, step).as_posix(), commit or self._revision)

    def _cached(self) -> tuple[str | None, list[str]] | None:
        """The commit in the cache, and its files."""
        hub = _hub()
        try:
            folder = Path(hub.snapshot_download(self._repository, revision=self._revision, local_files_only=True))
        except Exception:
            return None
        return folder.name, [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


class _Unreachable(ConfigError):
    """The Hub does not answer."""


def _asked(question: Callable[[], Result], what: str, revision: str | None) -> Result:
    from huggingface_hub import errors

    at = "" if revision is None else f" at revision {revision}"
    try:
        return question()
    except errors.RevisionNotFoundError:
        raise ConfigError(f"the Hub has no revision {revision} of {what}") from None
    except errors.LocalEntryNotFoundError as error:
        raise _Unreachable(f"the Hub does not answer for {what}{at}: {_reason(error)}") from None
    except errors.EntryNotFoundError:
        raise ConfigError(f"the Hub has no {what}{at}") from None
    except errors.RepositoryNotFoundError:
        raise ConfigError(f"the Hub has no repository {what}, or it needs a token (HF_TOKEN)") from None
    except errors.HFValidationError as error:
        raise ConfigError(f"{what} is no name of a repository: {_reason(error)}") from None
    except (errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        raise _Unreachable(f"the Hub does not answer for {what}{at}: {_reason(error)}") from None
    except Exception as error:  # its HTTP library's, which differs between versions
        raise _Unreachable(f"the Hub does not answer for {what}{at}: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:150] or type(error).__name__


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ConfigError("checkpoints of the Hugging Face Hub need its package: pip install 'icl[hub]'") from None
    return huggingface_hub
