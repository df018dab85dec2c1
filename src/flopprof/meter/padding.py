"""How many tokens are no padding: summed where the mask is, read when the device has long been past it."""

from __future__ import annotations

from typing import Any

import torch


class Unpadded:
    """Sums of attention masks."""

    def seen(self, mask: torch.Tensor) -> Any:
        """A mask of zeros and ones, or booleans: its sum, or a place where the sum will be."""
        with torch._C._DisableTorchDispatch(), torch.no_grad():  # it is no work of the model's
            count = mask.count_nonzero()
            if count.device.type == "cpu":
                return int(count)
            place = torch.empty((), dtype=count.dtype, pin_memory=True) if count.device.type == "cuda" else None
            if place is None:
                return count
            place.copy_(count, non_blocking=True)
            return place

    def read(self, place: Any) -> int:
        """The sum; of a device, only once it is past the step."""
        return int(place)
