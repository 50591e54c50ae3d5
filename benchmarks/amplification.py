"""How much plans should make of what the field makes of errors: `python -m benchmarks.amplification`.

Plans that weigh errors by a power of how many times larger they become in one of twenty samples as rehearsed, for the
powers 0 (as without rehearsal), 1/2 and 1 (which ships). Of each, the evaluations that `rtol` spends and the
median of achieved over asked, the means of eight errors asked for, after a rehearsal with 64 samples (videos: 24) of
the calibration seeds; and how far errors of the worst decile, and of the median, of 64 samples (videos: 16, mixtures:
256) of the choosing seeds are below those of power 0, in dB, the mean of all lengths. Prints Markdown; on one core
the SiT takes 40 minutes and a mixture three. `--field sit` takes one field alone.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import cases
from benchmarks.metrics import relative_error
from benchmarks.sweep import Setting, settings
from sencache import CachedField, SensitivityProfile, calibrate
from sencache.amplification import run_amplified
from sencache.conformal import shortest, tolerance_limit
from sencache.plan import sampler_name
from sencache.rehearse import TEACHERS, usual_budgets
from solvers import Stepper, integrate

POWERS = (0.0, 0.5, 1.0)
RTOLS = (0.05, 0.03, 0.02, 0.01, 0.007, 0.005, 0.003, 0.002)


class Group(NamedTuple):
    """Samples and their full run's end."""

    field: Any
    x: Tensor
    full: Tensor


class Known(NamedTuple):
    """A field that is calibrated: its grid and stepper, and those who rehearse and those who choose."""

    profile: SensitivityProfile
    ts: Tensor
    stepper: Stepper
    rehearsed: Group
    choosing: Group


def trained(name: str) -> Known:
    case = cases()[name]
    few, many = (64, 64) if name == "sit" else (24, 16)
    field, x, _ = case.samples(8 + few, "calibration")
    groups = (field.select(torch.arange(8, 8 + few)), x[8:]), case.samples(many, "choosing")[:2]
    ts = case.grid()
    return Known(case.profile, ts, case.stepper, *(Group(f, x, integrate(f, x, ts, case.stepper)) for f, x in groups))


def mixture(setting: Setting) -> Known:
    ts, stepper = setting.grid(setting.steps), setting.stepper
    profile = calibrate(setting.field(8), setting.start(8, "calibration"), ts, stepper, progress=False)
    starts = setting.start(72, "calibration")[8:], setting.start(256, "choosing")
    groups = [(setting.field(len(x)), x) for x in starts]
    return Known(profile, ts, stepper, *(Group(f, x, integrate(f, x, ts, stepper)) for f, x in groups))


def fields() -> dict[str, Callable[[], Known]]:
    """By name."""
    every: dict[str, Callable[[], Known]] = {name: lambda name=name: trained(name) for name in cases()}  # type: ignore[misc]
    for one in settings():
        if one.name.startswith("mixture"):
            every[one.name] = lambda one=one: mixture(one)  # type: ignore[misc]
    return every


class Met(NamedTuple):
    """What plans of one length did."""

    limit: float  # that a rehearsal finds
    errors: Tensor  # (S,) of the choosing seeds


def measured(known: Known, amplified: Tensor, seen: dict[Any, Met]) -> dict[int, Met]:
    """Of each length what the plan did that weighs errors by this, from `seen` where plans are the same."""
    facts = {**known.profile.facts, "rehearsed": sampler_name(known.stepper, known.ts)}
    profile, found = replace(known.profile, amplified=amplified, facts=facts), {}
    for nfe in usual_budgets(len(known.ts) - 1):
        cached = [CachedField(group.field, profile, nfe=nfe) for group in (known.rehearsed, known.choosing)]
        plan = cached[0].plan(known.ts, known.stepper)
        key = plan.reuse, plan.variable, *plan.nodes.tolist()
        if key not in seen:
            own, other = (
                relative_error(one.integrate(group.x, known.ts, known.stepper), group.full).double()
                for one, group in zip(cached, (known.rehearsed, known.choosing), strict=True)
            )
            seen[key] = Met(tolerance_limit(own[TEACHERS:], 0.9) if plan.stable else math.inf, other)
        found[nfe] = seen[key]
    return found


def kept(met: dict[int, Met], steps: int) -> tuple[float, float]:
    """The evaluations that `rtol` spends, and the median of achieved over asked: means over `RTOLS`."""
    spent, achieved = [], []
    for rtol in RTOLS:
        nfe = shortest({n: each.limit for n, each in met.items()}, rtol)
        spent.append(nfe or steps)
        achieved.append(float(met[nfe].errors.median()) / rtol if nfe else 0.0)
    return sum(spent) / len(RTOLS), sum(achieved) / len(RTOLS)


def gained(met: dict[int, Met], plain: dict[int, Met]) -> list[float]:
    """How far errors of the worst decile and of the median are below those of `plain`, the mean over lengths (dB)."""
    ratios = [[plain[nfe].errors.quantile(q) / met[nfe].errors.quantile(q) for nfe in met] for q in (0.9, 0.5)]
    return [float(20 * torch.stack(each).log10().mean()) for each in ratios]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--field", nargs="+", choices=fields(), default=list(fields()), help="default: all")
    names = parser.parse_args().field
    torch.set_grad_enabled(False)
    print("Evaluations, achieved / asked; worst decile, median (dB).\n")
    print(f"| field | {' | '.join(f'power {power:g}' for power in POWERS)} |\n|---|{'---|' * len(POWERS)}")
    for name in names:
        known = fields()[name]()
        steps, seen = len(known.ts) - 1, dict[Any, Met]()
        amplified = run_amplified(*known.rehearsed[:2], known.ts, known.stepper)[1][:TEACHERS]
        rows = [measured(known, amplified**power, seen) for power in POWERS]
        cells = ["{:.1f}, {:.2f}; {:+.1f}, {:+.1f}".format(*kept(met, steps), *gained(met, rows[0])) for met in rows]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
