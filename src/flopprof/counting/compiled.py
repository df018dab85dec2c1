"""Compiled functions run eagerly in a thread that counts, and stay compiled.

A compiled region runs kernels that no dispatch mode sees, so under a counter the original function runs instead:
torch has a switch for that, asked at every call of a compiled function, which nothing else notices. It is in
torch._dynamo, whose import takes seconds: where nobody has imported it yet, the switch is turned once somebody does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from flopprof.counting.imports import WhenImported, replaced


def run_eagerly(counting: Callable[[], Any]) -> WhenImported:
    """Turns the switch for threads that count."""

    def eager() -> bool:
        return bool(counting()) and not compiling_higher_order()

    def turn(dynamo: ModuleType) -> Callable[[], object]:
        nested = getattr(dynamo, "_is_eager_on_nested_compile", None)
        if nested is not None:
            return replaced(dynamo, "_is_eager_on_nested_compile", lambda: nested() or eager())
        # Older torch asks the stance instead, whose answer None stands for eager.
        callback = dynamo._callback_from_stance
        return replaced(dynamo, "_callback_from_stance", lambda given: None if eager() else callback(given))

    return WhenImported("torch._dynamo.eval_frame", turn)


def compiling_higher_order() -> bool:
    """Is torch setting up a control-flow operator (cond, scan, flex_attention ...) for its eager run?

    That compiles the operator's bodies, and insists on it.
    """
    utils = sys.modules.get("torch._higher_order_ops.utils")
    return bool(getattr(getattr(utils, "_hop_compile_tls", None), "in_hop_compile", False))
