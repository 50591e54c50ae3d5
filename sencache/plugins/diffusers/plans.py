"""Plans for trajectories that are handed from one model to another, as Wan 2.2 does: its experts share no outputs.

Shapes: T query times; n gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sencache.plan import Plan, Problem, best_plan
from sencache.plugins.diffusers.decide import Options
from sencache.plugins.diffusers.sampler import Sampler
from sencache.profile import SensitivityProfile


@dataclass(frozen=True, eq=False)
class Relay(Problem):
    """A problem in which the times `starts` must be evaluated: nothing is continued or repaid across them."""

    starts: Sequence[int] = ()

    def residual(self, before: Tensor, ref: Tensor, end: Tensor) -> Tensor:
        starts = torch.tensor(self.starts, dtype=torch.int64)
        before = torch.where(torch.isin(ref, starts), -1, before)
        left = super().residual(before, ref, end)
        if not self.correct or not len(starts):
            return left
        unpaid = replace(self, correct=False).residual(before, ref, end)
        return torch.where(torch.isin(end, starts)[:, None], unpaid, left)

    def costs(self) -> Tensor:
        cost = super().costs()
        for start in self.starts:
            cost[:, :start, start + 1 :] = torch.inf
        return cost


def plan_of(
    profile: SensitivityProfile,
    sampler: Sampler,
    name: str,
    options: Options,
) -> Plan:
    """The best plan on a scheduler's grid.

    Raises ValueError where the profile does not cover the grid or was not rehearsed for an `rtol`, and where `nfe` is
    less than one evaluation a model.
    """
    times, nfe = sampler.times, options.nfe
    if not profile.covers(times).all():
        raise ValueError(
            f"The profile was measured for t in [{profile.t.min():g}, {profile.t.max():g}], and this run goes from "
            f"{times[0]:g} to {times[-1]:g}. Leave `profile` out, and the first run measures itself."
        )
    if options.rtol is not None and profile.budgets is None:
        raise ValueError("`rtol` needs plans that were rehearsed on this pipeline: `handle.rehearse([run, run, ...])`.")
    passed = [
        (times - at) * profile.direction >= -1e-6 * (times[0] - times[-1]).abs()
        for at in profile.facts.get("crossings", [])
    ]
    starts = sorted({int(late.double().argmax()) for late in passed if late.any() and not late[0]})
    if nfe is not None and nfe <= len(starts):
        raise ValueError(f"`nfe` is {nfe}, and {len(starts) + 1} models take turns: give each one an evaluation.")
    problem = partial(Relay, starts=starts)
    return best_plan(profile, times, sampler.gain, name, options.reuse, options.correct, nfe, options.rtol, problem)
