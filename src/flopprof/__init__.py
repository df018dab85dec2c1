"""Count the FLOPs of PyTorch models: per operator, module and phase. The public names, lazily."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flopprof.compare import diff as diff
    from flopprof.compare.assertion import assert_flops as assert_flops
    from flopprof.compare.comparison import Comparison as Comparison
    from flopprof.compare.run import compare as compare
    from flopprof.counting.count import count as count
    from flopprof.counting.graph import trace as trace
    from flopprof.counting.runtime import FlopCounter as FlopCounter
    from flopprof.counting.runtime import region as region
    from flopprof.errors import FlopprofError as FlopprofError
    from flopprof.formulas import Cost as Cost
    from flopprof.formulas import register_formula as register_formula
    from flopprof.hardware import Peak as Peak
    from flopprof.hardware import measure_peak as measure_peak
    from flopprof.hardware import peak as peak
    from flopprof.inference import Inference as Inference
    from flopprof.inference import inference as inference
    from flopprof.ledger import reconcile as reconcile
    from flopprof.meter import Meter as Meter
    from flopprof.models import Workload as Workload
    from flopprof.models import load as load
    from flopprof.plan import plan as plan
    from flopprof.profile import Profile as Profile

__version__ = "0.1.0.dev0"

_HOME = {
    "Comparison": "flopprof.compare.comparison",
    "compare": "flopprof.compare.run",
    "assert_flops": "flopprof.compare.assertion",
    "diff": "flopprof.compare",
    "count": "flopprof.counting.count",
    "trace": "flopprof.counting.graph",
    "FlopCounter": "flopprof.counting.runtime",
    "region": "flopprof.counting.runtime",
    "FlopprofError": "flopprof.errors",
    "Cost": "flopprof.formulas",
    "register_formula": "flopprof.formulas",
    "Peak": "flopprof.hardware",
    "measure_peak": "flopprof.hardware",
    "peak": "flopprof.hardware",
    "Inference": "flopprof.inference",
    "inference": "flopprof.inference",
    "reconcile": "flopprof.ledger",
    "Meter": "flopprof.meter",
    "Workload": "flopprof.models",
    "load": "flopprof.models",
    "plan": "flopprof.plan",
    "Profile": "flopprof.profile",
}
__all__ = [
    "Comparison",
    "Cost",
    "FlopCounter",
    "FlopprofError",
    "Inference",
    "Meter",
    "Peak",
    "Profile",
    "Workload",
    "assert_flops",
    "compare",
    "count",
    "diff",
    "inference",
    "load",
    "measure_peak",
    "peak",
    "plan",
    "reconcile",
    "region",
    "register_formula",
    "trace",
]


def __getattr__(name: str) -> Any:  # the value is whatever the public name is
    if name not in _HOME:
        raise AttributeError(f"module 'flopprof' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
