"""Why a measured count differs from 2 N T and 6 N T: a Profile in, a Ledger out. Needs no torch."""

from flopprof.ledger.joints import Joint, joints
from flopprof.ledger.terms import BACKWARD, FORWARD, HARDWARE, Item, Ledger, ParameterUse, Term, reconcile

__all__ = [
    "BACKWARD",
    "FORWARD",
    "HARDWARE",
    "Item",
    "Joint",
    "Ledger",
    "ParameterUse",
    "Term",
    "joints",
    "reconcile",
]
