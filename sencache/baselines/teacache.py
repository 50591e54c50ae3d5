"""TeaCache (Liu et al. 2024, arXiv 2411.19108; code: ali-vilab/TeaCache).

Of two consecutive queries the relative L1 distance of the timestep-modulated inputs m,

    l_k = |m_k - m_(k-1)|_1 / |m_(k-1)|_1,

rescaled by a polynomial, stands for that of the outputs. It is summed since the last evaluation, and an output is
reused while the sum is below a threshold. Shapes: B samples; m (B, ...); ts (K + 1,).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sencache.baselines.steps import apart, due, full_run, grid_of, mean_abs
from sencache.batch import copy
from sencache.memory import Look
from solvers import Euler, Stepper

EULER = Euler()


class TeaCache:
    """The criterion: `tolerance` is the authors' threshold, 0.03 to 0.3 in their settings.

    watch: what is compared, called with the field's arguments, (x, t) -> m (B, ...): `modulated` of our adapters.
    coefficients: of the polynomial, the highest power first, from `teacache_coefficients` or the authors' code.
    first, last: how many steps at the ends of ts are always evaluated: one each in the authors' code, and for Wan with
        `use_ret_steps` 5 and 0.
    """

    direction = 0

    def __init__(
        self, watch: Callable[..., Any], coefficients: Sequence[float], ts: Tensor, *, first: int = 1, last: int = 1
    ):
        self.watch, self.coefficients = watch, [float(c) for c in coefficients]
        self.ts, self.first, self.last = grid_of(ts), first, last

    def predicted(self, seen: Look) -> Tensor:
        if seen.noted is None:
            return torch.full_like(seen.t, math.inf)
        change = rescaled(self.coefficients, relative(seen.now, seen.noted))
        return (seen.spent + change).masked_fill(due(self.ts, seen, self.first, self.last), math.inf)

    def note(self, seen: Look, rows: Tensor, y: Any) -> Any:
        return copy(seen.now)  # of every query, evaluated or not


def relative(now: Any, before: Any) -> Tensor:
    """The relative L1 distance (B,) float64 of two trees of tensors (B, ...)."""
    return apart(now, before) / mean_abs(before)


def rescaled(coefficients: Sequence[float], change: Tensor) -> Tensor:
    """The polynomial, its highest power first, at each change (B,)."""
    value = torch.zeros_like(change)
    for c in coefficients:
        value = value * change + c
    return value


def teacache_coefficients(
    field: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    ts: Tensor,
    stepper: Stepper = EULER,
    *,
    watch: Callable[[Tensor, Tensor], Any] | None = None,
    degree: int = 4,
) -> list[float]:
    """Fit the polynomial as the authors do, along full runs from x (B, ...) at ts[0]: the highest power first.

    Of each sample and each two consecutive queries it takes the relative L1 distances of what `watch` sees, by default
    `field.modulated`, and of the outputs, and fits the second to the first by least squares. The authors sample 70
    prompts. Raises ValueError where there are fewer different distances than coefficients.
    """
    watch = watch or getattr(field, "modulated", None)
    if watch is None:
        raise ValueError(
            f"{type(field).__name__} has no `modulated(x, t)`: say with `watch` what is to be compared of two queries."
        )
    seen: list[tuple[Any, Tensor]] = []
    changes: list[tuple[Tensor, Tensor]] = []

    def look(x: Tensor, t: Tensor) -> Tensor:
        now = copy(watch(x, t)), field(x, t).clone()
        if seen:
            changes.append((relative(now[0], seen[0][0]), relative(now[1], seen[0][1])))
        seen[:] = [now]
        return now[1]

    full_run(look, x, ts, stepper)
    inputs, outputs = (torch.cat(parts).numpy() for parts in zip(*changes, strict=True))
    if len(np.unique(inputs)) <= degree:
        raise ValueError(
            f"A polynomial of degree {degree} needs more than {degree} different changes of what is watched; here are "
            f"{len(np.unique(inputs))}. Take a grid of more steps, or a lower `degree`."
        )
    return [float(c) for c in np.polyfit(inputs, outputs, degree)]
