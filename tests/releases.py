"""The release of torch that the tables, and what is said of torch's own counter, were written for."""

from __future__ import annotations

import torch

WRITTEN_FOR = (2, 15)
RELEASE = tuple(int(number) for number in torch.__version__.split(".")[:2])
WRITTEN_FOR_THIS = RELEASE == WRITTEN_FOR
