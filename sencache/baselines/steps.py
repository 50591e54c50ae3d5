"""What the baselines share: steps counted along a grid, means of absolute values, and a full run that is looked at.

Shapes: B samples; ts (K + 1,), step k from ts[k] to ts[k + 1]; T query times of a sampler on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sencache.memory import Look
from sencache.norms import difference
from sencache.trees import tensors
from solvers import Stepper, integrate
from solvers.loop import check_grid


def step_of(ts: Tensor, t: Tensor) -> Tensor:
    """The step (B,) of the grid ts (K + 1,) that begins at t (B,), or in which t lies; K at its end."""
    direction = (ts[-1] - ts[0]).sign()
    slack = 1e-6 * (ts[-1] - ts[0]).abs()
    return torch.searchsorted(ts * direction, t * direction + slack, right=True) - 1


def due(ts: Tensor, seen: Look, first: int, last: int) -> Tensor:
    """Whether samples (B,) must be evaluated: in the `first` and the `last` steps of ts (K + 1,), or with no output."""
    k = step_of(ts, seen.t)
    return (k < first) | (k >= len(ts) - 1 - last) | ~seen.known


def grid_of(ts: Tensor) -> Tensor:
    """The grid (K + 1,) as criteria keep it: float64 on the host."""
    return check_grid(ts).double().cpu()


def mean_abs(tree: Any) -> Tensor:
    """The mean of the absolute values of each sample, over all tensors (B, ...) of a tree, (B,) float64 on the host."""
    parts = [part.to(torch.promote_types(part.dtype, torch.float32)).reshape(len(part), -1) for part in tensors(tree)]
    total = torch.stack([part.abs().sum(1).double() for part in parts]).sum(0)
    return (total / sum(part.shape[1] for part in parts)).cpu()


def apart(a: Any, b: Any) -> Tensor:
    """`mean_abs` (B,) of a - b, two trees of the same tensors (B, ...)."""
    return mean_abs([difference(one, two) for one, two in zip(tensors(a), tensors(b), strict=True)])


def full_run(look: Callable[[Tensor, Tensor], Tensor], x: Tensor, ts: Tensor, stepper: Stepper) -> Tensor:
    """The end (B, ...) of a run in which `look`, (x, t) -> v, evaluates a field and writes down what it sees."""
    if stepper.adaptive:
        raise ValueError(f"Calibrate with a fixed-step method; {stepper} chooses its own steps.")
    with torch.no_grad():
        return integrate(look, x, ts, stepper)
