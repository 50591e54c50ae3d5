"""Rehearse plans on fresh samples, so that an error asked for is an error met: split conformal prediction.

What a plan expects leaves out what errors do to later outputs, so it is too low, by a factor that differs from field to
field. The factor is measured: R_s = error of sample s / error expected, for S samples that calibration has not seen.
A new sample's factor is at most the k-th smallest of them with probability at least k / (S + 1), whatever their
distribution, as long as all are exchangeable: new seeds with new prompts are, new seeds of one prompt are not (Vovk et
al. 2005). k is chosen for 90 %; fewer than 9 samples cannot promise that, and their largest promises S / (S + 1).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sencache.cache import CachedField
from sencache.norms import rms
from sencache.plan import influence, sampler_name
from sencache.profile import SensitivityProfile
from solvers import Euler, Stepper, VelocityField, WhiteNoise, integrate

EULER = Euler()


def rehearse(
    field: VelocityField,
    profile: SensitivityProfile,
    x: Tensor,
    ts: Tensor,
    stepper: Stepper = EULER,
    *,
    budgets: tuple[int, ...] = (),
) -> SensitivityProfile:
    """The profile with the factors of plans of `budgets` evaluations, from fresh x (S, ...) at ts[0] on ts (K + 1,).

    Pays for one full run and one of each plan; the default budgets are 1/5, 1/3, 1/2 and 3/4 of the full run's.
    With them `CachedField(field, profile, rtol=...)` keeps what it promises, on this grid with this stepper. Between
    two budgets the factor is interpolated; below the least and above the largest nothing is promised but by evaluating
    everything. Raises ValueError for a stepper that asks for several outputs a step, and for one whose noise is drawn
    anew in each run (a `BrownianPath` is not).
    """
    if isinstance(getattr(stepper, "noise", None), WhiteNoise):
        raise ValueError("Runs with fresh noise cannot be compared: rehearse with a `BrownianPath`, drawn once.")
    steps, times = len(ts) - 1, influence(stepper, ts)[0]
    if len(times) != steps:
        raise ValueError(
            f"{stepper} asks for several outputs a step, of which plans leave some out: use `nfe` with it."
        )
    with torch.no_grad():
        full = integrate(field, x, ts, stepper)
        budgets = tuple(sorted(set(budgets or (steps // 5, steps // 3, steps // 2, 3 * steps // 4)) - {0}))
        factors = []
        for nfe in budgets:
            cached = CachedField(field, profile, nfe=nfe)
            error = rms(cached.integrate(x, ts, stepper) - full).double() / rms(full).double()
            factors.append((error.cpu() / cached.plan(ts, stepper).relative_error).nan_to_num(nan=0.0))  # 0 of 0
    facts = {**profile.facts, "rehearsed": sampler_name(stepper, ts)}
    return replace(profile, budgets=torch.tensor(budgets), factors=torch.stack(factors), facts=facts)
