"""How much a tolerance has to allow for a wanted number of evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable

ROUNDS = 9


def tolerance_that_spends(nfe: int, spent: Callable[[float], float], low: float, high: float = 3.0) -> float:
    """The tolerance under which about `nfe` evaluations are spent, by bisection of its logarithm from `low` to `high`.

    spent: the evaluations that a tolerance leads to, the fewer the larger it is.
    """
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(math.exp(middle)) > nfe else (low, middle)
    return math.exp((low + high) / 2)
