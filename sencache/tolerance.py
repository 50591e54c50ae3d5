"""Tolerances that change with t."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sencache.plan import Plan
from sencache.profile import SensitivityProfile
from solvers.loop import check_grid


def strict_start(ts: Tensor, tolerance: float, strict: float = 0.01, share: float = 0.2) -> Callable[[float], float]:
    """epsilon(t) of the paper's experiments: `strict` in the first `share` of the steps of ts (K + 1,), then another.

    The paper's settings are 0.01 for the first 20 %, then 0.1 (slow) or 0.2 (fast) for Wan, 0.6 for CogVideoX and 0.5
    for LTX. Step k begins at ts[k]; a time between two grid times belongs to the step it lies in.
    """
    ts = check_grid(ts).double().cpu()
    if not (tolerance >= 0 and strict >= 0 and 0 <= share <= 1):
        raise ValueError(f"Expected tolerances >= 0 and a share in [0, 1]; got {tolerance}, {strict} and {share}.")
    first = math.ceil(share * (len(ts) - 1) - 1e-9)  # the first step that is no longer strict
    slack = 1e-6 * (ts[-1] - ts[0]).abs().item()
    return StrictStart(ts[first].item(), (ts[1] - ts[0]).sign().item(), slack, strict, tolerance)


@dataclass(frozen=True)
class StrictStart:
    """epsilon(t): `strict` before the time `boundary`, in the direction of t, and `tolerance` from there on."""

    boundary: float
    direction: float
    slack: float
    strict: float
    tolerance: float

    def __call__(self, t: float) -> float:
        return self.strict if (t - self.boundary) * self.direction < -self.slack else self.tolerance


@dataclass(frozen=True, eq=False)
class PlannedTolerance:
    """epsilon(t) at the query times of a plan, and the variable in which that plan continues outputs."""

    times: Tensor  # (T,)
    epsilon: Tensor  # (T,)
    variable: str

    def __call__(self, t: float) -> float:
        return float(self.epsilon[(self.times - t).abs().argmin()])


def planned_tolerance(plan: Plan, profile: SensitivityProfile) -> PlannedTolerance:
    """A plan as epsilon(t) for the paper's rule, which then evaluates about where it does, sooner for quick samples.

    The states along the calibrated trajectories are sums of outputs, so that the Gram matrix knows how far they go and
    Eq. 9 what it predicts for every gap. Over a gap epsilon is the geometric mean of S at its last reuse and S at the
    evaluation that ends it; infinite after the last. With few evaluations, wide apart, a sample much slower than the
    calibrated ones can miss a node and slip into the next gap; `nfe` cannot.

    Use it with ``max_reuses=math.inf``, in units of the output, and with the plan's own `reuse` and `correct`. Raises
    ValueError for a profile without sensitivities.
    """
    times, nodes = plan.times, plan.nodes.tolist()
    steps = torch.cat([times.diff(), times.new_zeros(1)])
    gram = profile.gram_at(times).mean(0)
    alpha_x, alpha_t = profile.lookup(times)
    if not (alpha_x[plan.nodes].isfinite() & alpha_t[plan.nodes].isfinite()).all():
        raise ValueError(
            "A tolerance goes with sensitivities, and this profile has none at some of the plan's nodes: calibrate "
            "with secants=True, on a grid that covers them."
        )

    def change(ref: int, end: int) -> float:  # S at `end` of what was evaluated at `ref`, Eq. 9
        dt = steps[ref:end]
        distance = (dt @ gram[ref:end, ref:end] @ dt).clamp(min=0).sqrt()
        return float(alpha_x[ref] * distance + alpha_t[ref] * (times[end] - times[ref]).abs())

    epsilon = torch.full_like(times, math.inf)
    for ref, end in pairwise(nodes):
        last = change(ref, end - 1) if end > ref + 1 else change(ref, end) / 4
        epsilon[ref + 1 : end + 1] = math.sqrt(last * change(ref, end))
    return PlannedTolerance(times, epsilon, plan.variable)
