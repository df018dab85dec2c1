"""The Hugging Face hub, through huggingface_hub: one small file, or the headers of safetensors; never a weight."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flopprof.errors import (
    AccessDenied,
    FlopprofError,
    HubUnreachable,
    InvalidCheckpoint,
    MissingPackage,
    UnknownTarget,
    UsageError,
)
from flopprof.models.inputs import first_line
from flopprof.models.safetensors_headers import (
    INDEX,
    SINGLE,
    Stored,
    StoredTensor,
    check,
    read_index,
    read_remotely,
    read_small,
)

_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Repository:
    """A model on the hub, at a revision (a branch, tag or commit; None is its main branch)."""

    name: str
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> Repository:
        """The repository that `ORG/NAME` or `ORG/NAME@revision` names. Raises UsageError."""
        name, at, revision = text.partition("@")
        hub = _hub()
        try:
            hub.utils.validate_repo_id(name)
        except ValueError as error:
            raise UsageError(f"hf:{text} names no repository: {first_line(error)} Write hf:ORG/NAME.") from error
        if at and not revision:
            raise UsageError(f"hf:{text} ends in @: write hf:{name}@REVISION, or leave it out.")
        return cls(name, revision or None)

    def fetch(self, file: str) -> Path:
        """A small file of the repository, from the hub; from the cache where the hub cannot be reached."""
        hub = _hub()
        try:
            with self._explained(file):
                commit = self._asked().sha
        except HubUnreachable:
            cached = hub.try_to_load_from_cache(self.name, file, revision=self.revision)
            if not isinstance(cached, str):
                raise
            return Path(cached)
        with self._explained(file):
            return Path(hub.hf_hub_download(self.name, file, revision=commit))

    def _asked(self) -> Any:
        """The hub's description of the revision: its commit and its files. Asked once, without retries."""
        hub = _hub()
        if hub.constants.HF_HUB_OFFLINE:
            raise hub.errors.OfflineModeIsEnabled("offline mode is on")
        return hub.HfApi().model_info(self.name, revision=self.revision, timeout=_PATIENCE_S)

    def headers(self) -> Stored | None:
        """What the safetensors files store, by range requests; None where there are none, or no way to ask."""
        try:
            with self._explained(SINGLE):
                files = {file.rfilename for file in self._asked().siblings or ()}
        except HubUnreachable:
            return None
        if SINGLE in files:
            return Stored(self._header(SINGLE), 1)
        if INDEX not in files:
            return None
        return read_remotely(read_index(read_small(self.fetch(INDEX)), INDEX), self._header, f"{self.name}/{INDEX}")

    def _header(self, file: str) -> Mapping[str, StoredTensor]:
        with self._explained(file):
            found = _hub().HfApi().parse_safetensors_file_metadata(self.name, file, revision=self.revision).tensors
        tensors: dict[str, StoredTensor] = {}
        for name, tensor in found.items():
            sizes, span = tuple(tensor.shape), tuple(tensor.data_offsets)
            if len(span) != 2 or not all(type(size) is int and size >= 0 for size in (*sizes, *span)):
                raise InvalidCheckpoint(f"{self.name}/{file} gives {name[:80]!r} sizes that are no sizes.")
            tensors[name] = StoredTensor(str(tensor.dtype), sizes, (span[0], span[1]))
        check(tensors, None, f"{self.name}/{file}")
        return tensors

    @contextmanager
    def _explained(self, file: str) -> Iterator[None]:
        """Turns what huggingface_hub raises into one sentence each."""
        errors = _hub().errors
        where = self.name if self.revision is None else f"{self.name}@{self.revision}"
        try:
            yield
        except FlopprofError:
            raise
        except errors.GatedRepoError as error:
            raise AccessDenied(
                f"{where} is gated: accept its terms on huggingface.co, then give a token with `hf auth login`."
            ) from error
        except errors.RevisionNotFoundError as error:
            raise UnknownTarget(f"{self.name} has no revision {self.revision!r} on the Hugging Face hub.") from error
        except errors.RepositoryNotFoundError as error:
            raise UnknownTarget(
                f"the Hugging Face hub has no model {self.name!r}, or it is private: check the name, or give a token "
                "with `hf auth login`."
            ) from error
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
            way = (
                "offline mode is on (HF_HUB_OFFLINE)" if _hub().constants.HF_HUB_OFFLINE else "the hub gives no answer"
            )
            raise HubUnreachable(
                f"{file} of {where} is not in the cache, and {way}: connect, or give a directory that holds it."
            ) from error
        except errors.EntryNotFoundError as error:
            raise UnknownTarget(
                f"{where} has no {file} on the Hugging Face hub: it is no transformers model."
            ) from error
        except (errors.SafetensorsParsingError, errors.NotASafetensorsRepoError) as error:
            raise InvalidCheckpoint(f"{file} of {where} is no safetensors file: {first_line(error)}") from error
        except (errors.HfHubHTTPError, OSError) as error:
            raise HubUnreachable(f"{file} of {where} could not be fetched: {first_line(error)}") from error
        except Exception as error:
            # The HTTP library's own exceptions: which library depends on huggingface_hub's version.
            if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
                raise
            raise HubUnreachable(f"{file} of {where} could not be fetched: {first_line(error)}") from error


@contextmanager
def offline(*, unless: bool = False) -> Iterator[None]:
    """While open, huggingface_hub fetches nothing."""
    constants: Any = None
    with suppress(ModuleNotFoundError):
        constants = importlib.import_module("huggingface_hub.constants")
    if constants is None or unless:
        yield
        return
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _hub() -> Any:
    try:
        for part in ("constants", "errors", "utils"):
            importlib.import_module(f"huggingface_hub.{part}")
        return importlib.import_module("huggingface_hub")
    except ModuleNotFoundError as error:
        if error.name != "huggingface_hub":
            raise
        raise MissingPackage("hf: models need huggingface_hub: pip install 'flopprof[hf]'") from error
