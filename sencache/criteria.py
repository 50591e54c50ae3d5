"""Who says how far an output has moved: measured sensitivities, a plan, or the outputs themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sencache.memory import Look
from sencache.plan import Plan
from sencache.profile import SensitivityProfile
from sencache.reuse import Variable


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
    """A plan's: infinite once one of its nodes has been reached since the last evaluation, else what it expects."""

    plan: Plan

    @property
    def direction(self) -> int:
        return self.plan.direction

    def predicted(self, seen: Look) -> Tensor:
        expected = self.plan.predicted(seen.t_ref, seen.t)
        return torch.where(seen.distance.isfinite(), expected, torch.inf)


@dataclass(frozen=True)
class Differences:
    """No calibration: the last two evaluations say how fast the output moves.

    Sums |dt| |s - s_r| ||y_r - y_2|| / |s_r - s_2| over the reuses since the last evaluation, |dt| being the sampler's
    last step: how far, in units of the state, holding y_r would have led astray by now. A line through both is better
    than that, in proportion. Infinite until two evaluations are known.
    """

    variable: Variable
    direction: int = 0

    def predicted(self, seen: Look) -> Tensor:
        s, s_ref, s_before = (self.variable(t) for t in (seen.t, seen.t_ref, seen.t_before))
        rate = seen.difference / (s_ref - s_before).abs()
        return seen.spent + seen.since * (s - s_ref).abs() * rate
