"""After every test, whatever torch holds process-wide is what it was: no mode, hook or patched function stays."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import settings
from torch.autograd.variable import Variable
from torch.nn.modules import module as modules
from torch.optim import optimizer as optimizers

# The same examples on every machine; no deadline, because the first call of an operator is slow.
settings.register_profile("flopprof", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("flopprof")

# A shell that starts the tests in the background has them, and each command that they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Looked up by name in the class itself: an inherited or rebound attribute is another thing.
_FUNCTIONS = (
    *((torch.nn.Module, name) for name in ("__call__", "_call_impl", "_wrapped_call_impl", "forward")),
    *((torch.nn.Module, name) for name in ("compile", "_compiled_call_impl", "_replicate_for_data_parallel")),
    *((torch.nn.Parameter, name) for name in ("requires_grad", "requires_grad_", "detach_")),
    (torch.autograd.Function, "apply"),
    (Variable, "_execution_engine"),
    *((torch.utils.checkpoint._checkpoint_hook, name) for name in ("__init__", "__enter__", "__exit__")),
    *((torch.utils.checkpoint._recomputation_hook, name) for name in ("__init__", "__enter__", "__exit__")),
    (torch.utils.checkpoint.CheckpointFunction, "forward"),
    (torch.utils.checkpoint.CheckpointFunction, "backward"),
    (torch.utils.checkpoint, "checkpoint"),
    (torch.optim.Optimizer, "profile_hook_step"),
    (torch, "compile"),
    (torch.jit, "script"),
    (torch.compiler, "set_stance"),
    (torch._dynamo.eval_frame, "_stance"),
    (torch.Tensor, "backward"),
    (torch.autograd, "backward"),
    (torch.autograd, "grad"),
)
_HOOKS = (
    (modules, [f"_global_{kind}_hooks" for kind in ("forward", "forward_pre", "backward", "backward_pre")]),
    (optimizers, ["_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"]),
)


def _state() -> dict[str, Any]:
    functions = {f"{owner.__name__}.{name}": vars(owner).get(name) for owner, name in _FUNCTIONS}
    hooks = {name: list(vars(owner)[name].items()) for owner, names in _HOOKS for name in names}
    return {
        **functions,
        **hooks,
        "attention": id(torch.nn.functional.scaled_dot_product_attention),  # what stands in for it equals it
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "function modes": torch._C._len_torch_function_stack(),
        "saved tensor hooks": torch._C._autograd._top_saved_tensors_default_hooks(False),
        "autograd threads": torch._C._is_multithreading_enabled(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "default dtype": torch.get_default_dtype(),
    }


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    before = _state()
    yield
    after = _state()
    assert {
        name: after[name] for name in after if after[name] is not before[name] and after[name] != before[name]
    } == {}
