"""What a reuse returns: the last evaluation, or its continuation along the line through the last two.

A payload is y_r + phi (y_r - y_2), of the last two evaluations at s_r and s_2 in the variable s(t) in which outputs are
continued. phi = 0 holds; phi = (s - s_r) / (s_r - s_2) extrapolates linearly, which keeps a second-order solver at its
order. What is continued is the field's output, or what the blocks of a transformer add to its tokens, on which its
head then runs anew. Shapes: (B,) float64, NumPy's, for everything about time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sencache.batch import Array, copy, spread
from sencache.trees import replace, tensors

REACH = 4.0  # how many times the span between two evaluations a line through them is continued

Variable = Callable[[Array], Array]
Phi = Callable[[Array, Array, Array], Array]


def hold(s: Array, s_ref: Array, s_before: Array) -> Array:
    """phi of the zeroth order: the evaluation itself."""
    return np.zeros(np.broadcast_shapes(s.shape, s_ref.shape, s_before.shape))


def linear(s: Array, s_ref: Array, s_before: Array) -> Array:
    """phi of the first order. No line without two evaluations (s_before NaN), nor further than `REACH` spans."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        phi = (s - s_ref) / (s_ref - s_before)
    return np.maximum(-REACH, np.minimum(REACH, np.where(np.isfinite(phi), phi, 0.0)))


REUSES: dict[str, Phi] = {"hold": hold, "linear": linear}


def continued(last: Any, before: Any, phi: Array) -> Any:
    """A copy of each sample's last evaluation, continued by phi (B,) of its difference from the one before."""
    if not phi.any():
        return copy(last)

    def along(y: Tensor, y_before: Tensor) -> Tensor:
        shares = torch.from_numpy(phi).to(y.dtype)
        share = spread(shares, y)
        line = torch.lerp(y, y_before, -share)
        return line if shares.all() else torch.where(share == 0, y, line)

    return replace(last, [along(*pair) for pair in zip(tensors(last), tensors(before), strict=True)])


def time_itself(t: Array) -> Array:
    """s = t."""
    return t


def log_to_zero(t: Array) -> Array:
    """s = log t, for data at t = 0: near there log-SNR but for a constant."""
    return np.asarray(np.log(np.maximum(abs(t), 1e-12)))


def log_to_one(t: Array) -> Array:
    """s = log(1 - t), for data at t = 1."""
    return log_to_zero(1 - t)


VARIABLES: dict[str, Variable] = {"t": time_itself, "log t": log_to_zero, "log(1 - t)": log_to_one}
