"""The methods that are compared: what each makes of samples at a budget of evaluations.

What a method has to measure beforehand it measures on the calibration seeds, and its knob (a threshold, the choice of a
solver or of a peer's setting) is set on the choosing seeds: `benchmarks.comparison --choose`. Both are plain numbers.
Baselines reuse what their authors reuse, the block stack or, EasyCache, the difference of output and state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import STEPS, Case, Samples, cases
from sencache import CachedField, SensitivityProfile, assumed, calibrate, strict_start
from sencache.baselines import (
    EasyCache,
    MagCache,
    TeaCache,
    lemica,
    magnitude_ratios,
    segment_errors,
    teacache_coefficients,
    uniform,
)
from solvers import DPMSolverPP, Stepper, UniPC, grids, integrate

BLOCKS = 5  # of the video models
FINE = 2 * STEPS


class Outcome(NamedTuple):
    """The samples x (B, ...) that came out, and the evaluations that each cost in the mean."""

    x: Tensor
    evaluations: float


@dataclass(frozen=True)
class Method:
    """How a method samples, and what has to be found for it first.

    sample: (case, samples, nfe, knob, measured) -> outcome. knob: which kind it has: a "tolerance", an "option", one of
        the "free" solvers, a setting of a "peer", or none. options: those, and of a tolerance what there is to choose
        from beside it, when the knob is a dictionary of both. measure: of the field, beforehand.
    """

    name: str
    sample: Callable[..., Outcome]
    knob: str | None = None
    measure: Callable[[Case], Any] | None = None
    peer: peers.Peer | None = None
    options: tuple[dict[str, Any], ...] = ()

    @property
    def timed(self) -> Callable[..., Outcome]:
        """`sample` without what is only there to count."""
        return partial(self.sample, counted=False) if self.peer else self.sample

    def runs_on(self, case: Case) -> bool:
        return self.peer is None or case.name in self.peer.families


def cached(case: Case, samples: Samples, stepper: Stepper | None = None, steps: int = STEPS, **options: Any) -> Outcome:
    """The case's own sampler over all its steps, with a `CachedField` of these options."""
    field = CachedField(samples.field, **options)
    x = field.integrate(samples.x, case.grid(steps), stepper or case.stepper)
    return Outcome(x, float(field.report.evaluations.double().mean()))


def plain(samples: Samples, grid: Tensor, stepper: Stepper) -> Outcome:
    return Outcome(integrate(samples.field, samples.x, grid, stepper), len(grid) - 1)


def ours(case: Case, samples: Samples, nfe: int, knob: None, measured: None, **options: Any) -> Outcome:
    return cached(case, samples, profile=case.profile, nfe=nfe, **options)


def ours_unipc(case: Case, samples: Samples, nfe: int, knob: None, measured: None) -> Outcome:
    return ours(case, samples, nfe, knob, measured, stepper=UniPC(case.path))


def ours_fine(case: Case, samples: Samples, nfe: int, knob: None, measured: None) -> Outcome:
    """For whom the ODE is the aim: under a cache steps are free, so UniPC takes twice as many, calibrated on them."""
    return cached(case, samples, UniPC(case.path), FINE, profile=fine_profile(case.name), nfe=nfe)


@cache
def fine_profile(name: str) -> SensitivityProfile:
    """What 8 samples of the calibration seeds measure on the fine grid."""
    case = cases()[name]
    field, x, _ = case.samples(8, "calibration")
    return calibrate(field, x, case.grid(FINE), UniPC(case.path), progress=False)


def ours_uncalibrated(case: Case, samples: Samples, nfe: int, knob: float, measured: None) -> Outcome:
    return cached(case, samples, tolerance=knob)


def ours_assumed(case: Case, samples: Samples, nfe: int, knob: None, measured: None) -> Outcome:
    return cached(case, samples, profile=assumed(case.path, case.grid()), nfe=nfe)


def sencache_paper(case: Case, samples: Samples, nfe: int, knob: float, measured: None) -> Outcome:
    """The authors' settings, their strict start too: 10 steps; n = 3, unlimited at budgets that this cannot reach."""
    epsilon, n = strict_start(case.grid(), knob), 3 if nfe >= 20 else math.inf
    rule: dict[str, Any] = dict(tolerance=epsilon, max_reuses=n, reuse="hold", payload="blocks")
    return cached(case, samples, profile=case.profile, **rule)


def sencache_rule(case: Case, samples: Samples, nfe: int, knob: dict[str, float], measured: None) -> Outcome:
    """Eq. 10 alone, on outputs: no strict start."""
    n, tolerance = knob["max_reuses"], knob["tolerance"]
    return cached(case, samples, profile=case.profile, tolerance=tolerance, max_reuses=n, reuse="hold")


def as_published(
    case: Case, samples: Samples, criterion: Any, payload: str = "blocks", reuse: str = "hold", **options: Any
) -> Outcome:
    return cached(case, samples, criterion=criterion, reuse=reuse, correct=False, payload=payload, **options)


def teacache(case: Case, samples: Samples, nfe: int, knob: dict[str, Any], measured: list[float]) -> Outcome:
    criterion = TeaCache(samples.field.modulated, measured, case.grid(), first=knob["first"], last=knob["last"])
    return as_published(case, samples, criterion, tolerance=knob["tolerance"])


def magcache(case: Case, samples: Samples, nfe: int, knob: dict[str, float], measured: list[float]) -> Outcome:
    criterion = MagCache(measured, case.grid(), retention=knob["retention"])
    return as_published(case, samples, criterion, tolerance=knob["tolerance"], max_reuses=knob["max_reuses"])


def easycache(case: Case, samples: Samples, nfe: int, knob: dict[str, Any], measured: None) -> Outcome:
    criterion = EasyCache(case.grid(), warmup=knob["warmup"])
    return as_published(case, samples, criterion, "difference", tolerance=knob["tolerance"])


def lemica_path(case: Case, samples: Samples, nfe: int, knob: None, measured: list[list[float]]) -> Outcome:
    return as_published(case, samples, lemica(measured, case.grid(), nfe, case.stepper))


def evenly(case: Case, samples: Samples, nfe: int, knob: dict[str, bool], measured: None, **options: Any) -> Outcome:
    return as_published(case, samples, uniform(case.grid(), nfe, case.stepper, **knob), **options)


def measured_teacache(case: Case) -> list[float]:
    return teacache_coefficients(*case.samples(8, "calibration")[:2], case.grid(), case.stepper)


def measured_magcache(case: Case) -> list[float]:
    return magnitude_ratios(*case.samples(8, "calibration")[:2], case.grid(), case.stepper)


def measured_lemica(case: Case) -> list[list[float]]:
    """On one sample, since that costs as much as 146 full runs of it."""
    return segment_errors(*case.samples(1, "calibration")[:2], case.grid(), case.stepper)


def fewer_steps(case: Case, samples: Samples, nfe: int, knob: None, measured: None) -> Outcome:
    return plain(samples, case.grid(nfe), case.stepper)


def free_solvers(case: Case, nfe: int) -> dict[str, tuple[Tensor, Stepper]]:
    """What costs nothing to try: second-order solvers of `nfe` steps, each on every grid that people use."""
    plan = CachedField(case.field(case.conditions(1, "choosing")), case.profile, nfe=nfe).plan(
        case.grid(), case.stepper
    )
    inner = grids.log_snr(nfe - 2, case.path, 1 - 1 / nfe, 1 / nfe)
    on = {
        "its own grid": case.grid(nfe),
        "uniform": grids.uniform(nfe),
        "shift 3": grids.shifted(nfe, 3.0),
        "log-SNR": torch.cat([torch.ones(1), inner, torch.zeros(1)]),
        "the plan's nodes": grids.through(plan.times[plan.nodes], 0.0),
    }
    solvers: dict[str, Stepper] = {"UniPC": UniPC(case.path), "DPM-Solver++ 2M": DPMSolverPP(case.path)}
    return {f"{solver}, {grid}": (on[grid], solvers[solver]) for solver in solvers for grid in on}


def fewer_steps_free(case: Case, samples: Samples, nfe: int, knob: str, measured: None) -> Outcome:
    return plain(samples, *free_solvers(case, nfe)[knob])


def task(case: Case, samples: Samples) -> peers.Task:
    """What a peer is asked to sample."""
    return peers.Task(case.name, case.model, samples.conditions, samples.x, case.grid(), case.stepper, case.guidance)


def peer(
    case: Case, samples: Samples, nfe: int, knob: peers.Setting, measured: None, who: peers.Peer, counted: bool = True
) -> Outcome:
    """A first block that is run only to decide is not charged: it is a fifth of these models, a thirtieth of Wan's."""
    x, cost = peers.sample(who, knob, task(case, samples), counted)
    return Outcome(x, who.computed(cost, STEPS, BLOCKS))


def peer_settings(
    case: Case, samples: Samples, who: peers.Peer, budgets: tuple[int, ...]
) -> list[peers.Setting | None]:
    """A peer's setting for each budget, None where it cannot be had for it."""
    costs = [who.cost(nfe, STEPS, BLOCKS) for nfe in budgets]
    return peers.settings_for(who, task(case, samples), costs)


REUSES = ({"max_reuses": 3}, {"max_reuses": 5}, {"max_reuses": STEPS})  # n of the paper's rule; the last is no limit
TEACACHE = ({"first": 1, "last": 1}, {"first": 5, "last": 0})  # the authors' two
EVENLY = ({"last": False}, {"last": True})
MAGCACHE = tuple(  # the authors' retention and K = 4 for Wan come first; less and no limit where more is to be saved
    {"retention": share, "max_reuses": most} for share in (0.2, 0.1) for most in (4, STEPS)
)
EASYCACHE = tuple({"warmup": steps} for steps in (10, 5, 2))  # the authors take ten for Wan
NAMES = {
    "FirstBlockCache": "first-block-cache",
    "MagCache": "magcache-diffusers",
    "SeaCache": "seacache",
    "TaylorSeer": "taylorseer",
    "TaylorSeer lite": "taylorseer-lite",
    "PAB": "pab",
    "FasterCache": "fastercache",
    "DBCache": "cache-dit",
    "DBCache + TaylorSeer": "cache-dit-taylorseer",
}
METHODS = {
    method.name: method
    for method in (
        Method("ours", ours),
        Method("ours-unipc", ours_unipc),
        Method("ours-fine", ours_fine),
        Method("ours-uncalibrated", ours_uncalibrated, "tolerance"),
        Method("ours-assumed", ours_assumed),
        Method("sencache-paper", sencache_paper, "tolerance"),
        Method("sencache-rule", sencache_rule, "tolerance", options=REUSES),
        Method("teacache", teacache, "tolerance", measured_teacache, options=TEACACHE),
        Method("magcache", magcache, "tolerance", measured_magcache, options=MAGCACHE),
        Method("easycache", easycache, "tolerance", options=EASYCACHE),
        Method("lemica", lemica_path, None, measured_lemica),
        Method("uniform", evenly, "option", options=EVENLY),
        Method("taylorseer-stack", partial(evenly, reuse="linear"), "option", options=EVENLY),
        Method("best-hold", partial(ours, reuse="hold")),
        *(Method(NAMES[who.name], partial(peer, who=who), "peer", peer=who) for who in peers.PEERS),
        Method("fewer-steps", fewer_steps),
        Method("fewer-steps-unipc", fewer_steps_free, "free"),
    )
}
HOLD = ("sencache-paper", "sencache-rule", "teacache", "magcache", "easycache", "lemica", "uniform", "best-hold",
        "first-block-cache", "magcache-diffusers", "pab", "fastercache", "cache-dit")  # fmt: skip
FORECAST = ("taylorseer-stack", "seacache", "taylorseer", "taylorseer-lite", "cache-dit-taylorseer")
