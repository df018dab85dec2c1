"""The Hugging Face hub, through huggingface_hub: one small file, or the headers of safetensors; never a weight."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
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
    LENGTH,
    MOST_BYTES,
    SINGLE,
    Stored,
    StoredTensor,
    parse_header,
    read_index,
    read_remotely,
    read_small,
)

_PATIENCE_S = 10.0
_FIRST = 100_000  # bytes: most headers are no longer
_PARTIAL = 206


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

    def fetch(self, file: str, most: int = MOST_BYTES) -> Path:
        """A small file of the repository, from the hub; from the cache where the hub cannot be reached.

        Raises InvalidCheckpoint for one of more than `most` bytes, before it is fetched.
        """
        hub = _hub()
        try:
            with self._explained(file):
                asked = self._asked
        except HubUnreachable:
            cached = hub.try_to_load_from_cache(self.name, file, revision=self.revision)
            if not isinstance(cached, str):
                raise
            return Path(cached)
        size = self._sizes.get(file)
        if size is not None and size > most:
            raise InvalidCheckpoint(f"{self.name}/{file} has {size:,} bytes; more than {most:,} are not read.")
        with self._explained(file):
            return Path(hub.hf_hub_download(self.name, file, revision=asked.sha))

    @cached_property
    def _asked(self) -> Any:
        """The hub's description of the revision: its commit, its files and their sizes. Asked once, without retries."""
        hub = _hub()
        if hub.constants.HF_HUB_OFFLINE:
            raise hub.errors.OfflineModeIsEnabled("offline mode is on")
        return hub.HfApi().model_info(self.name, revision=self.revision, timeout=_PATIENCE_S, files_metadata=True)

    @cached_property
    def _sizes(self) -> Mapping[str, int | None]:
        """Bytes of each file; None where the hub does not say."""
        sizes = {file.rfilename: getattr(file, "size", None) for file in self._asked.siblings or ()}
        return {name: size if type(size) is int and size >= 0 else None for name, size in sizes.items()}

    def headers(self) -> Stored | None:
        """What the safetensors files store, by range requests; None where there are none, or no way to ask."""
        try:
            with self._explained(SINGLE):
                files = self._sizes
        except HubUnreachable:
            return None
        if SINGLE in files:
            return Stored(self._header(SINGLE), 1)
        if INDEX not in files:
            return None
        return read_remotely(read_index(read_small(self.fetch(INDEX)), INDEX), self._header, f"{self.name}/{INDEX}")

    def _header(self, file: str) -> Mapping[str, StoredTensor]:
        """The tensors of one file, checked against its size as a local file's are."""
        where, size = f"{self.name}/{file}", self._sizes.get(file)
        if file not in self._sizes:
            raise InvalidCheckpoint(f"{self.name}/{INDEX} names {file}, and the repository has no such file.")
        with self._explained(file):
            first = self._bytes(file, 0, _FIRST if size is None else min(_FIRST, size))
            length = int.from_bytes(first[:LENGTH], "little")
            if len(first) < LENGTH or (size is not None and length > size - LENGTH):
                held = len(first) if size is None else size
                raise InvalidCheckpoint(
                    f"{where} is cut short: its header claims {length:,} bytes, and the file has {held:,}."
                )
            if length > MOST_BYTES:
                raise InvalidCheckpoint(
                    f"{where} has a header of {length:,} bytes; more than {MOST_BYTES:,} are not read."
                )
            raw = first[LENGTH : LENGTH + length]
            raw += self._bytes(file, LENGTH + len(raw), length - len(raw))
        if len(raw) != length:
            raise InvalidCheckpoint(f"{where} is cut short: of a header of {length:,} bytes {len(raw):,} are there.")
        return parse_header(raw, None if size is None else size - LENGTH - length, where)

    def _bytes(self, file: str, start: int, count: int) -> bytes:
        """So many bytes of a file from a place on, or as many as there are; no more are taken."""
        if count < 1:
            return b""
        hub = _hub()
        address = hub.hf_hub_url(self.name, file, revision=self._asked.sha)
        asked = {**hub.utils.build_hf_headers(), "range": f"bytes={start}-{start + count - 1}"}
        answer = hub.utils.get_session().get(address, headers=asked, timeout=_PATIENCE_S)
        hub.utils.hf_raise_for_status(answer)
        if answer.status_code != _PARTIAL:
            raise HubUnreachable(
                f"{file} of {self.name}: the server gives whole files alone, and weights are not fetched."
            )
        content: bytes = answer.content
        return content[:count]

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
