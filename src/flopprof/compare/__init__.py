"""Profiles side by side: what changed between two, and whether one keeps a budget."""

from __future__ import annotations

from flopprof.compare.budget import Budget, Excess, Limit, Verdict
from flopprof.compare.difference import Change, Difference, diff

__all__ = ["Budget", "Change", "Difference", "Excess", "Limit", "Verdict", "diff"]
