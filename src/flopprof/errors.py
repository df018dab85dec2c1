"""What flopprof raises: one sentence each, saying what, where, what it got and what to do."""

from __future__ import annotations


class FlopprofError(Exception):
    """Base of every error that flopprof raises on purpose; `exit_code` is the command line's."""

    exit_code = 1


class UsageError(FlopprofError):
    """The request itself is wrong: an unknown name, shape, option or file. Exit code 2."""

    exit_code = 2


class UnknownTarget(UsageError):
    """No model goes by that name."""


class MissingPackage(UsageError):
    """An optional package is needed; the message holds the exact `pip install`."""


class ModelFailed(FlopprofError):
    """The model itself raised while it was built or run; the cause is chained."""


class ValuesUnknown(FlopprofError, NotImplementedError):
    """The model asks for values of a tensor on the meta device, which has none. As torch's own, a RuntimeError."""


class Untraceable(FlopprofError):
    """No graph can be made of the model; the message names the construct and the model's line. count() runs it."""


class UncountedOperators(FlopprofError):
    """`--strict` was given and some operator has no formula."""


class InvalidProfile(UsageError):
    """A profile file that cannot be read; the message names the field."""


class FormulaError(FlopprofError):
    """A formula was registered wrongly, or could not read its operator's arguments."""


class NoForm(FlopprofError):
    """No closed form is known: none was asked for, or none is proved; the message says why."""


class EnginesDisagree(FlopprofError):
    """Two of flopprof's own engines give one module different counts; the message names the modules."""


class OverBudget(FlopprofError):
    """`flopprof check` found a figure over its limit; what is printed names the modules."""


class InvalidCheckpoint(UsageError):
    """A config.json or a safetensors file that cannot be what it claims; the message names the file and the field."""


class HubUnreachable(FlopprofError):
    """The Hugging Face hub gave no answer, or offline mode is on and the cache does not hold the file."""


class AccessDenied(FlopprofError):
    """The Hugging Face hub holds the model back: its terms must be accepted, or a token given."""


class UnknownDevice(UsageError):
    """No peak is known of the device; the message says how to give one."""


class NoPeak(UsageError):
    """The device has no peak in that dtype, or none is known; the message lists those it has."""
