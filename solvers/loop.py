"""The loop: a stepper carried along a time grid. Knows neither the field's inside nor the stepper's method.

Shapes: x, dx, v (B, ...); ts (K + 1,); everything a step says about time is 0-dim, in the grid's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from solvers.field import VelocityField
from solvers.ode import Euler
from solvers.stepper import Step, Stepper

EULER = Euler()


def trajectory(field: VelocityField, x: Tensor, ts: Tensor, stepper: Stepper = EULER) -> Iterator[Step]:
    """Integrate dx/dt = field(x, t) from x (B, ...) at ts[0] along the grid ts (K + 1,), one `Step` an interval.

    `ts` may rise or fall. The default stepper is `Euler()`. Raises ValueError for a grid or a state that cannot be
    integrated, and FloatingPointError naming t when the field returns NaN or infinity.
    """
    check_state(x)
    check_stepper(stepper)
    moves = _moves(contract(field), x, check_grid(ts), stepper)
    return (Step(x, t_next, dx, t_next - t, stepper.weights(t, t_next)) for t, t_next, dx, x in moves)


def _moves(field: VelocityField, x: Tensor, ts: Tensor, stepper: Stepper) -> Iterator[tuple[Tensor, ...]]:
    """Of every interval its times, what the stepper moved, and where to."""
    memory = None
    for t, t_next in pairwise(ts):
        dx, memory = stepper.advance(field, x, t, t_next, memory)
        x = x + dx
        yield t, t_next, dx, x


def integrate(field: VelocityField, x: Tensor, ts: Tensor, stepper: Stepper = EULER) -> Tensor:
    """The state (B, ...) at ts[-1]; arguments and errors are `trajectory`'s."""
    check_state(x)
    check_stepper(stepper)
    for *_, moved in _moves(contract(field), x, check_grid(ts), stepper):
        x = moved
    if not x.isfinite().all():
        raise FloatingPointError(
            f"The state overflowed before t = {float(ts[-1]):g}. Take smaller steps, or look there."
        )
    return x


def check_grid(ts: Tensor) -> Tensor:
    """`ts` as a floating-point tensor, or a ValueError that says what is wrong with it."""
    ts = ts if isinstance(ts, Tensor) else torch.as_tensor(ts, dtype=torch.float64, device="cpu")
    if ts.ndim != 1 or len(ts) < 2:
        raise ValueError(f"`ts` must be a grid of at least two times, shape (K + 1,); got shape {tuple(ts.shape)}.")
    ts = ts if ts.is_floating_point() else ts.double()
    if not ts.isfinite().all():
        k = int((~ts.isfinite()).nonzero()[0, 0])
        raise ValueError(f"`ts` must be finite; got ts[{k}] = {ts[k]:g}.")
    steps = ts.diff()
    wrong = (steps * steps[0].sign() <= 0).nonzero().flatten().tolist() if steps[0] != 0 else [0]
    if wrong:
        k = wrong[0]
        sign = "==" if steps[k] == 0 else "<" if steps[k] > 0 else ">"
        raise ValueError(f"`ts` must be strictly monotone; got ts[{k}] {sign} ts[{k + 1}]: {ts[k]:g}, {ts[k + 1]:g}.")
    return ts


def check_stepper(stepper: Stepper) -> None:
    """Raise where this is no stepper, such as a path or a name, or where a class stands for one of its instances."""
    for one in (stepper, getattr(stepper, "path", None)):
        if isinstance(one, type):
            raise TypeError(f"{one.__name__} is a class: call it, as in `Euler()` or `UniPC(Linear())`.")
    if not hasattr(stepper, "advance"):
        raise TypeError(f"Expected a stepper, such as `Euler()` or `UniPC(path)`; got {stepper!r}.")


def check_state(x: Tensor) -> None:
    """Raise where x is no batch of finite floating-point states."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor of shape (B, ...); got {kind}.")
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"x must hold at least one sample, shape (B, ...) with B >= 1; got shape {tuple(x.shape)}.")
    if not x.isfinite().all():
        raise ValueError("x holds NaN or infinity before the first step; check where the initial state comes from.")


def contract(field: VelocityField) -> VelocityField:
    """The field with its promise checked at every evaluation: x's shape, x's dtype, finite numbers."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        v = field(x, t)
        if not isinstance(v, Tensor) or v.shape != x.shape or v.dtype != x.dtype:
            came = f"{tuple(v.shape)} {v.dtype}" if isinstance(v, Tensor) else type(v).__name__
            raise TypeError(
                f"The field must return a velocity like x, {tuple(x.shape)} {x.dtype}; got {came} at t = {float(t):g}."
            )
        if not math.isfinite(v.detach().sum().item()):  # quicker than to look at each number, but it may overflow
            rows = (~v.isfinite()).reshape(len(v), -1).any(1)
            if rows.any():
                raise FloatingPointError(
                    f"The field returned NaN or infinity at t = {float(t):g} in samples "
                    f"{rows.nonzero()[:, 0].tolist()}. Look at the field there, or end the grid before a singular time."
                )
        return v

    return velocity
