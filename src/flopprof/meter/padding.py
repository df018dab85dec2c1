"""How many tokens are no padding: summed where the mask is, read when the device has long been past it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch


class Padding(NamedTuple):
    """Where a call tells padding: its argument of that place or name has this value there. tokens: padding included."""

    argument: int | str
    value: int
    tokens: int


class Unpadded:
    """Sums of attention masks."""

    def seen(self, padding: Padding, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, int]:
        """(tokens that are no padding, or a place where their number will be; all tokens) of a call."""
        where = padding.argument
        told = args[where] if isinstance(where, int) else kwargs[where]
        with torch._C._DisableTorchDispatch(), torch.no_grad():  # it is no work of the model's
            count = (told if padding.value == 0 else told != padding.value).count_nonzero()
            if count.device.type == "cpu":
                return int(count), padding.tokens
            place = torch.empty((), dtype=count.dtype, pin_memory=True) if count.device.type == "cuda" else None
            if place is None:
                return count, padding.tokens
            place.copy_(count, non_blocking=True)
            return place, padding.tokens

    def padded(self, seen: tuple[Any, int]) -> int:
        """So many tokens of that call were padding; of a device, only once it is past the step."""
        count, tokens = seen
        return tokens - int(count)
