"""Tokens for each expert, as a run saw them: written as JSON, and read back for a model on meta.

    {"model.layers.0.mlp": [17, 3, 0, 12], "model.layers.*.mlp": [8, 8, 8, 8]}

A key is a glob over the module that routes, or one around it; of several that fit, the first holds. Its numbers are
the tokens that each expert gets in one forward.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flopprof.errors import FlopprofError, UsageError
from flopprof.models.inputs import first_line
from flopprof.models.workload import Workload
from flopprof.profile import Profile

_MOST_BYTES = 10_000_000


def routed(workload: Workload, given: Mapping[str, tuple[int, ...]]) -> Workload:
    """The workload with its routers told. Raises UsageError off meta, where the model itself chooses."""
    if workload.device != "meta":
        raise UsageError(
            f"--routing is for the meta device: on {workload.device} {workload.name} chooses its experts itself."
        )
    if workload.program is not None:
        raise UsageError(f"{workload.name} is an exported graph, which --routing cannot change: leave it out.")
    return replace(workload, routing=given)


def read_routing(path: str) -> dict[str, tuple[int, ...]]:
    """The routing that a file holds. Raises UsageError."""
    file = Path(path)
    try:
        if not file.is_file():
            raise UsageError(f"no file {path!r}: --routing takes the JSON that --save-routing writes.")
        if file.stat().st_size > _MOST_BYTES:
            raise UsageError(f"{path} has more than {_MOST_BYTES:,} bytes, which no routing takes.")
        given = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {first_line(error)}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    return checked(given, path)


def checked(given: Any, where: str) -> dict[str, tuple[int, ...]]:
    """The routing, its numbers counts. Raises UsageError, naming the key."""
    if not isinstance(given, Mapping) or not given:
        raise UsageError(f'{where} holds no routing: write {{"model.layers.*.mlp": [8, 8, 8, 8]}}.')
    found = {}
    for key, tokens in given.items():
        if not isinstance(key, str):
            raise UsageError(f"{where}: {key!r} is no pattern of modules.")
        if not isinstance(tokens, list | tuple) or len(tokens) < 2:
            raise UsageError(f"{where}: {key!r} takes a list of the tokens that each expert gets.")
        for expert, number in enumerate(tokens):
            if type(number) is not int or not 0 <= number < 2**62:
                raise UsageError(f"{where}: {key!r} gives expert {expert} {str(number)[:40]} tokens.")
        found[key] = tuple(tokens)
    return found


def to_json(profile: Profile) -> str:
    """What the routers of a run did, for `read_routing`. Raises FlopprofError where that is not known."""
    if not profile.routing:
        why = "was counted on meta, where nothing is chosen" if profile.device == "meta" else "routes no tokens"
        raise FlopprofError(f"no routing to save: {profile.target or 'the model'} {why}.")
    for row in profile.routing:
        if row.calls != 1:
            raise FlopprofError(
                f"no routing to save: {row.fqn} routed {row.calls} times, and a file tells of one forward."
            )
    lines = [f"  {json.dumps(row.fqn)}: {json.dumps(list(row.tokens))}" for row in profile.routing]
    return "{\n" + ",\n".join(lines) + "\n}\n"
