"""What of a loop runs compiled: told by the frames on the stack, and by what `torch.compile` left on a module."""

from __future__ import annotations

import sys
from types import CodeType, FrameType

import torch

from flopprof.counting.in_place import compiled_in_place


def compiled_call() -> tuple[bool, bool]:
    """Of the call that a hook tells of in a step that is counted: (is it that of a compiled model, is it inside more?)

    A compiled function runs eagerly to be counted. Inside one, no hook will run once the step is not counted; those of
    a model that is itself compiled will, but of torch's own classes (Sequential), whose calls are compiled with hooks.
    """
    frame: FrameType | None = sys._getframe(1)
    itself = hidden = False
    while frame is not None and frame.f_code.co_filename.endswith(_ENTRY):
        itself |= _is_compiled(frame)
        hidden |= _is_inlined(frame.f_code)
        frame = frame.f_back
    return itself, (itself and hidden) or _in_compiled(frame)


def in_compiled() -> bool:
    """Does this run, eagerly, between a compiled function's entry and the code that was compiled of it?"""
    return _in_compiled(sys._getframe(1))


def _in_compiled(frame: FrameType | None) -> bool:
    while frame is not None and not _is_compiled(frame):
        frame = frame.f_back
    return frame is not None


def inside_in_place(module: torch.nn.Module) -> bool:
    """Does it run, in a step that is counted, inside another module that is compiled in place?"""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_wrapped_call_impl":
            caller = frame.f_locals.get("self")
            if caller is not module and isinstance(caller, torch.nn.Module) and compiled_in_place(caller) is not None:
                return True
        frame = frame.f_back
    return False


def _is_inlined(code: CodeType) -> bool:
    return code.co_name == "inner" and code.co_filename.endswith("_dynamo/external_utils.py")


def _is_compiled(frame: FrameType) -> bool:
    return frame.f_code.co_name == "compile_wrapper" and frame.f_code.co_filename.endswith("eval_frame.py")


_ENTRY = (
    *("meter/watching.py", "meter/recorder.py", "counting/instrument.py"),
    *("nn/modules/module.py", "_dynamo/eval_frame.py", "_dynamo/external_utils.py"),
)


def anything_compiled() -> bool:
    """Has anything been compiled in this process?"""
    frames = sys.modules.get("torch._dynamo.convert_frame")
    return frames is not None and bool(getattr(frames, "FRAME_COUNTER", 1))


def compiled_within(module: torch.nn.Module) -> bool:
    """Does a part of the model run compiled?"""
    if "torch._dynamo.eval_frame" not in sys.modules:
        return False
    wrapped = sys.modules["torch._dynamo.eval_frame"].OptimizedModule
    parts = module.modules()
    return any(isinstance(part, wrapped) or compiled_in_place(part) is not None for part in parts)
