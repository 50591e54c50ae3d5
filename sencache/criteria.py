"""Who says how far an output has moved: measured sensitivities, a plan, a schedule, or the outputs themselves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sencache.batch import Array
from sencache.memory import Look
from sencache.plan import Plan, Stops
from sencache.profile import SensitivityProfile
from sencache.reuse import REACH, Variable


@dataclass(frozen=True)
class Sensitivities:
    """The paper's: S = ||J_x|| ||dx|| + ||J_t|| |dt|, in units of the output."""

    profile: SensitivityProfile

    @property
    def direction(self) -> int:
        return self.profile.direction

    def predicted(self, seen: Look) -> Tensor:
        return self.profile.predicted(seen.t_ref, seen.t, seen.distance, seen.elapsed)


@dataclass(frozen=True)
class Planned:
    """A plan's: infinite once one of its nodes has been reached since the last evaluation, else what it expects.

    Of the sample at hand two things are known, what the plan expects of any, and how its own last two outputs differed
    beside the difference expected: the geometric mean of the expectation and the expectation so scaled is given. The
    state is not looked at: where it is no number, that shows at the next node.
    """

    plan: Plan

    @property
    def direction(self) -> int:
        return self.plan.direction

    def predicted(self, seen: Look) -> Tensor:
        change = self.changes(seen.t_ref.numpy(), seen.t.numpy(), seen.difference.numpy())
        return torch.from_numpy(np.where(seen.known.numpy(), change, np.inf))

    def changes(self, t_ref: Array, t: Array, difference: Array) -> Array:
        """What is given (B,) of reuses at t (B,) of what was evaluated at t_ref, `difference` from what was before."""
        expected, usual = self.plan.predicted(t_ref, t)
        with np.errstate(divide="ignore", invalid="ignore"):
            own = (difference / usual) ** 0.5
        return expected * np.where((own > 0) & (own < np.inf), own, 1.0)


@dataclass(frozen=True, eq=False)
class Scheduled:
    """Evaluate at given times and reuse at the others: infinite once one of them has come, else 0."""

    times: Tensor  # (T,) float64, all query times of the grid, in order
    nodes: Tensor  # (N,) int64, which of them are evaluated

    @property
    def direction(self) -> int:
        return self.stops.direction

    def predicted(self, seen: Look) -> Tensor:
        come = self.stops.between(seen.t_ref.numpy(), seen.t.numpy())
        return torch.zeros_like(seen.t).where(~torch.from_numpy(come) & seen.known, torch.inf)

    @cached_property
    def stops(self) -> Stops:
        return Stops(self.times, self.nodes)


class Differences:
    """No calibration: the last two evaluations say how fast the output moves, ||y_r - y_2|| / |s_r - s_2|.

    The change |s - s_r| later is that of holding y_r; a line through both does better, in proportion. Infinite until
    two evaluations are known, and further from them than `REACH` times the span between them: two that happen to be
    alike say nothing of what is far away.

    Where several conditionings are asked at one time, what is said of the first is said of all. Guidance multiplies
    their difference, and with it whatever does not cancel there, as errors of outputs evaluated at the same times do.
    """

    direction = 0

    def __init__(self, variable: Variable):
        self.variable = variable
        self.first = -1, torch.zeros(0, device="cpu"), torch.zeros(0, device="cpu")  # who, when, and what was said

    def predicted(self, seen: Look) -> Tensor:
        who, when, said = self.first
        if who != seen.branch and torch.equal(when, seen.t):
            return torch.where(seen.difference.isfinite(), said, torch.inf)
        said = self._own(seen)
        self.first = seen.branch, seen.t, said
        return said

    def _own(self, seen: Look) -> Tensor:
        times = (seen.t, seen.t_ref, seen.t_before)
        s, s_ref, s_before = (torch.from_numpy(self.variable(t.numpy())) for t in times)
        elapsed, span = (s - s_ref).abs(), (s_ref - s_before).abs()
        known = seen.difference.isfinite() & (elapsed <= (REACH + 1e-3) * span)
        return torch.where(known, elapsed * seen.difference / span, torch.inf)


@dataclass(frozen=True)
class Gains:
    """What the sampler makes of a change of the output in the sample: |dx_K / dv|, `charges`, at the query's time.

    Without a grid it is the sampler's last step |dt|, Euler's gain.
    """

    times: Tensor | None = None  # (T,) query times of the grid
    gain: Tensor | None = None  # (T,) how the stepper weighs each of their outputs in the end

    def at(self, seen: Look) -> Tensor:
        """The gain (B,) of the output at this query."""
        if self.times is None or self.gain is None:
            return seen.since
        return self.gain.abs()[(seen.t[:, None] - self.times).abs().argmin(1)]
