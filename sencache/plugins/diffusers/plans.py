"""Plans on a scheduler's grid, also where one model hands over to another, as Wan 2.2 does."""

from __future__ import annotations

from dataclasses import replace

import torch

from sencache.plan import Plan, best_plan
from sencache.plugins.diffusers.decide import Options
from sencache.plugins.diffusers.sampler import Sampler
from sencache.profile import SensitivityProfile


def plan_on_file(profile: SensitivityProfile, nfe: int) -> Plan:
    """The plan of `nfe` evaluations for the scheduler and grid that the profile was measured on.

    Raises ValueError for a profile that does not know how its scheduler weighed the outputs.
    """
    gain = profile.facts.get("gain")
    if gain is None:
        raise ValueError("This profile does not know its scheduler's weights, without which nothing can be planned.")
    weights = {("", 0): torch.tensor(gain, dtype=torch.float64, device="cpu")}
    sampler = Sampler(profile.t, torch.arange(len(profile.t), device="cpu"), (weights,))
    return plan_of(profile, sampler, profile.facts["sampler"], Options(nfe=nfe))


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
    part = torch.stack([times * 0, *(late.double() for late in passed if not late[0])]).sum(0).long()
    how = options.reuse, options.correct, nfe, options.rtol
    plan = best_plan(profile, times, sampler.gain, part, name, *how)
    return replace(plan, difference=plan.difference * torch.nan)  # of guided outputs, and each call is of one branch
