"""Tokens for each expert, as a run saw them: written as JSON, and read back for a model on meta.

    {"model.layers.0.mlp": [17, 3, 0, 12], "model.layers.*.mlp": [8, 8, 8, 8]}

A key is a glob over the module that routes, or one around it; of several that fit, the first holds. Its numbers are
the tokens that each expert gets in one forward; of a router that chooses several times in it, a list of such lists.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from flopprof.counting.routing import Routing, checked
from flopprof.errors import FlopprofError, UsageError
from flopprof.models.inputs import first_line
from flopprof.models.workload import Workload
from flopprof.profile import Profile

_MOST_BYTES = 10_000_000


def routed(workload: Workload, given: Routing) -> Workload:
    """The workload with its routers told. Raises UsageError off meta, where the model itself chooses."""
    if workload.device != "meta":
        raise UsageError(
            f"--routing is for the meta device: on {workload.device} {workload.name} chooses its experts itself."
        )
    if workload.program is not None:
        raise UsageError(f"{workload.name} is an exported graph, which --routing cannot change: leave it out.")
    return replace(workload, routing=given)


def read_routing(path: str) -> Routing:
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


def to_json(profile: Profile) -> str:
    """What the routers of a run did, for `read_routing`. Raises FlopprofError where that is not known."""
    if not profile.routing:
        seen = "was seen to choose among no experts, by topk, argmax or max"
        why = "was counted on meta, where nothing is chosen" if profile.device == "meta" else seen
        raise FlopprofError(f"no routing to save: {profile.target or 'the model'} {why}.")
    for row in profile.routing:
        if row.calls != 1 and not row.each:
            raise FlopprofError(
                f"no routing to save: {row.fqn} chose {row.calls} times, and a file tells of one forward."
            )
    lines = [f"  {json.dumps(row.fqn)}: {json.dumps(row.each or row.tokens)}" for row in profile.routing]
    return "{\n" + ",\n".join(lines) + "\n}\n"
