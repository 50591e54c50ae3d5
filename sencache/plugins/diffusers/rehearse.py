"""Rehearse plans on a pipeline, so that an error asked for is an error met; `sencache.rehearse` has the mathematics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sencache.checks import check_budgets
from sencache.norms import rms
from sencache.profile import SensitivityProfile
from sencache.rehearse import over, usual_budgets

if TYPE_CHECKING:
    from sencache.plugins.diffusers.handle import Handle


def rehearse(handle: Handle, runs: Sequence[Callable[[], Any]], budgets: tuple[int, ...] = ()) -> SensitivityProfile:
    """The profile of a pipeline with the factors of plans of `budgets` evaluations, from fresh runs; it is kept.

    runs: each one calls the pipeline once, with new seeds and prompts of its own, always on the same grid, and gives
        the same sample whenever it is called (so it seeds a generator itself). They are run in full and once with each
        budget, by default up to nine from 1/10 to 9/10 of the full run's; the full ones also measure what is not known.
    """
    budgets = check_budgets(budgets)
    wanted = handle.options
    factors: list[Tensor] = []
    sizes: dict[int, float] = {}
    try:
        for run in runs:
            full = _end(handle, run, tolerance=0.0)
            if not factors:
                _end(handle, run)  # measures, unless that was done before
                profile, budgets = _begun(handle, budgets)
            errors = []
            for nfe in budgets:
                error = rms(_end(handle, run, nfe=nfe) - full).double() / rms(full).double()
                plan = handle.plan
                assert plan is not None
                sizes[nfe] = plan.relative_error if plan.stable else torch.inf
                errors.append(over(error.cpu(), plan.relative_error))
            factors.append(torch.stack(errors))
    finally:
        handle.options = wanted
    if not factors or handle.known is None:
        raise ValueError("`runs` must hold at least one run of the pipeline; got none.")
    facts = {**profile.facts, "rehearsed": handle.known.name}
    measured = torch.cat(factors, 1)
    expected = torch.tensor([sizes[nfe] for nfe in budgets], dtype=torch.float64, device="cpu")
    known = {"budgets": torch.tensor(budgets, device="cpu"), "expected": expected, "factors": measured}
    profile = replace(profile, **known, ratios=None, amplified=None, facts=facts)
    handle.keep(profile)
    return profile


def _begun(handle: Handle, budgets: tuple[int, ...]) -> tuple[SensitivityProfile, tuple[int, ...]]:
    """The profile of the last run's sampler, and the budgets, rising."""
    profile, known = handle.profile, handle.known
    if profile is None or known is None or known.sampler is None:
        raise ValueError("Expected each run to call the pipeline once and to walk its whole grid; it did not.")
    size = len(known.sampler.times)
    if len(known.sampler.which) != size:
        raise ValueError(f"{known.name} asks for several outputs a step, of which plans leave some out: use `nfe`.")
    networks = len(profile.facts.get("crossings", [])) + 1
    budgets = budgets or tuple(usual_budgets(size, networks, most=9))
    if not budgets or budgets[-1] >= size:
        raise ValueError(f"Rehearse budgets below the {size} evaluations of a full run; got {budgets}.")
    return profile, budgets


def _end(handle: Handle, run: Callable[[], Any], **options: Any) -> Tensor:
    """The last state of a run with these options instead of the handle's."""
    plain = {"nfe": None, "rtol": None, "tolerance": None, "max_reuses": None, "reuse": "linear", "correct": True}
    handle.options = replace(handle.options, **(plain | options))
    handle.ends = []
    try:
        run()
        if len(handle.ends) != 1:
            raise ValueError(f"Expected a run to call the pipeline once; {len(handle.ends)} samples came to their end.")
        return handle.ends[0]
    finally:
        handle.ends = None
