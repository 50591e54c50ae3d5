"""Who decides in a pipeline, where one decision serves all the calls between two steps of the scheduler.

Shapes: B samples; rows R = m B of a call that stacks m conditionings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sencache.cache import Tolerance
from sencache.criteria import Planned, Sensitivities
from sencache.memory import Key, Look
from sencache.norms import Norm, difference, rms
from sencache.plan import Plan
from sencache.plugins.diffusers.debts import Debts, unfold
from sencache.profile import SensitivityProfile
from sencache.reuse import REACH, REUSES, VARIABLES
from sencache.run import Criterion, Rule


@dataclass(frozen=True)
class Options:
    """What `enable` was asked for; `CachedField` says what each means."""

    nfe: int | None = None
    rtol: float | None = None
    tolerance: Tolerance | None = None
    max_reuses: float | None = None
    reuse: str = "linear"
    correct: bool = True
    payload: str = "output"
    norm: Norm = rms
    key: Key | None = None
    together: bool | None = None

    def epsilon(self, t: float) -> float:
        """The tolerance at time t."""
        if self.tolerance is None:
            return math.inf
        return self.tolerance(t) if callable(self.tolerance) else self.tolerance

    def most(self, otherwise: float) -> float:
        """n, how many reuses in a row are allowed."""
        return otherwise if self.max_reuses is None else self.max_reuses


class Drift:
    """`Differences` in units of the state, from the guided outputs and the scheduler's own gain.

    Sums, over the reuses since the last evaluation, how far the scheduler's step carries the change of the output that
    the last two evaluations lead one to expect. Infinite until there are two, and further from them than `REACH` spans.
    """

    direction = 0

    def __init__(self, debts: Debts, norm: Norm):
        self.debts, self.norm = debts, norm
        self.said = torch.full((len(debts.closes),), torch.inf, dtype=torch.float64, device="cpu")

    def predicted(self, seen: Look) -> Tensor:
        return torch.where(seen.known, unfold(self.said, len(seen.t)), torch.inf)

    def stepped(self, k: int) -> None:
        """Call k is done: look ahead to the next."""
        debts, sampler = self.debts, self.debts.sampler
        if k + 1 == len(sampler.which) or debts.y_r is None or debts.y_2 is None:
            self.said = torch.full_like(self.said, torch.inf)
            return
        gain = sampler.weights[k + 1]["", 0][k + 1].abs()
        elapsed = (sampler.times[sampler.which[k + 1]] - debts.s_r).abs()
        span = (debts.s_r - debts.s_2).abs()
        rate = self.norm(difference(debts.y_r, debts.y_2)).double().cpu() / span
        rate = rate.masked_fill(elapsed > (REACH + 1e-3) * span, torch.inf)
        self.said = self.said.masked_fill(debts.closes, 0) + gain * elapsed * rate


class Unknown:
    """Nothing is known, and everything is evaluated."""

    direction = 0

    def predicted(self, seen: Look) -> Tensor:
        return torch.full_like(seen.t, torch.inf)


def everything(norm: Norm, payload: str) -> Rule:
    """The rule that evaluates everything."""
    return Rule(Unknown(), lambda t: 0.0, 0, REUSES["hold"], VARIABLES["t"], norm, payload)


def rule_of(options: Options, plan: Plan | None, profile: SensitivityProfile | None, debts: Debts) -> Rule:
    """The rule of a run whose first step has been seen."""
    phi, epsilon, what = REUSES[options.reuse], options.epsilon, (options.norm, options.payload)
    if plan is not None:
        return Rule(Planned(plan), epsilon, math.inf, REUSES[plan.reuse], VARIABLES[plan.variable], *what)
    if options.tolerance is None or options.tolerance == 0:
        return everything(*what)
    if profile is None:
        criterion: Criterion = Drift(debts, options.norm)
        together = options.together is not False  # a transformer computes all samples for the need of one
        return Rule(criterion, epsilon, options.most(math.inf), phi, VARIABLES["t"], *what, together=together)
    criterion = Sensitivities(profile)  # of x and t, which are the same for every conditioning
    together = bool(options.together)
    return Rule(criterion, epsilon, options.most(3), phi, VARIABLES["t"], *what, together=together)
