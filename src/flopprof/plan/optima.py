"""How large a model, on how many tokens, makes the best of a budget of FLOPs."""

from __future__ import annotations

import math

from flopprof.plan.result import Optimum

TOKENS_PER_PARAM = 20
# exponents and factors of L(N, D) = E + A / N^a + B / D^b
_FITS = (
    ("Hoffmann 2022, approach 3, refitted (Besiroglu 2024)", 482.01, 2085.43, 0.3478, 0.3658),
    ("Hoffmann 2022, approach 3, as printed", 406.4, 410.7, 0.34, 0.28),
)


def optima(flops: int) -> tuple[Optimum, ...]:
    """Chinchilla's answers for C = 6 N D: 20 tokens a parameter, and the parametric fits' minima.

    The fit's minimum (Hoffmann 2022, arXiv 2203.15556, eq. 4): N = G (C / 6)^(b / (a + b)), D = (C / 6) / N, G = (a A /
    (b B))^(1 / (a + b)). As printed, its rounded exponents ask for far more tokens than the paper's other approaches;
    Besiroglu 2024 (arXiv 2404.10102) refitted it to the paper's own runs.
    """
    product = flops / 6
    found = [_split(f"{TOKENS_PER_PARAM} tokens a parameter", product, math.sqrt(product / TOKENS_PER_PARAM))]
    for rule, of_params, of_tokens, a, b in _FITS:
        scale = (a * of_params / (b * of_tokens)) ** (1 / (a + b))
        found.append(_split(rule, product, scale * product ** (b / (a + b))))
    return tuple(found)


def _split(rule: str, product: float, params: float) -> Optimum:
    return Optimum(rule=rule, params=max(1, round(params)), tokens=max(1, round(product / params)))
