"""Tolerances that change with t."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from solvers.loop import check_grid


def strict_start(ts: Tensor, tolerance: float, strict: float = 0.01, share: float = 0.2) -> Callable[[float], float]:
    """epsilon(t) of the paper's experiments: `strict` in the first `share` of the steps of ts (K + 1,), then another.

    The paper's settings are 0.01 for the first 20 %, then 0.1 (slow) or 0.2 (fast) for Wan, 0.6 for CogVideoX and 0.5
    for LTX. Step k begins at ts[k]; a time between two grid times belongs to the step it lies in.
    """
    ts = check_grid(ts).double().cpu()
    if not (tolerance >= 0 and strict >= 0 and 0 <= share <= 1):
        raise ValueError(f"Expected tolerances >= 0 and a share in [0, 1]; got {tolerance}, {strict} and {share}.")
    steps = len(ts) - 1
    first = math.ceil(share * steps - 1e-9)  # the first step that is no longer strict
    direction = (ts[1] - ts[0]).sign().item()
    boundary, slack = ts[first].item(), 1e-6 * (ts[-1] - ts[0]).abs().item()

    def epsilon(t: float) -> float:
        return strict if (t - boundary) * direction < -slack else tolerance

    return epsilon
