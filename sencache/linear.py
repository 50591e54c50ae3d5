"""Whether a stepper is linear in the outputs it is given, which plans and corrections live on, and in how many.

A stepper whose steps add noise says by `linear` which method it is without.
"""

from __future__ import annotations

from itertools import islice, pairwise

import torch
from torch import Tensor

from solvers import Stepper


def uses_one_output(stepper: Stepper, ts: Tensor) -> bool:
    """Whether two steps of outputs 1 and 0 go as `weights` says: one output a step, and no history."""
    linear, outputs = getattr(stepper, "linear", stepper), iter([1.0, 0.0])
    nothing = torch.zeros(1, 1, dtype=torch.float64, device="cpu")
    x, memory, expected = nothing, None, nothing
    try:
        middle = ts.double().cpu()[max(0, len(ts) // 2 - 2) :]  # an end of the grid may be a lower-order step
        for output, (t, t_next) in zip((1.0, 0.0), pairwise(middle), strict=False):
            dx, memory = linear.advance(lambda x, t: torch.full_like(x, next(outputs)), x, t, t_next, memory)
            weights = linear.weights(t, t_next)
            x, expected = x + dx, weights.state * expected + weights.field * output
        return torch.allclose(x, expected)
    except (StopIteration, RuntimeError):  # it asked for more than one
        return False


def check_linear(stepper: Stepper, ts: Tensor) -> None:
    """Raise where a stepper makes of outputs a million times as large something else than a million times as much."""

    def moved(output: float) -> Tensor:
        x, memory = torch.zeros(1, 1, dtype=torch.float64, device="cpu"), None
        linear = getattr(stepper, "linear", stepper)
        for t, t_next in islice(pairwise(ts.double().cpu()), 3):
            dx, memory = linear.advance(lambda x, t: torch.full_like(x, output), x, t, t_next, memory)
            x = x + dx
        return x

    if not torch.allclose(moved(1e6), 1e6 * moved(1.0), rtol=1e-6, equal_nan=True):
        raise ValueError(
            f"{stepper} is not linear in the field's outputs (does it clip or threshold?), so that nobody knows what a "
            "reuse does to the sample, nor can it be repaid. Give `tolerance` in units of the output, with "
            "`correct=False`; or clip in the field instead of the stepper."
        )
