"""How much plans should make of what the field makes of errors: `python -m benchmarks.amplification`.

Plans that weigh errors by a power of how many times larger they become in the worst decile of the rehearsed samples,
for the powers 0 (as without rehearsal), 1/2 (which ships) and 1. Of each, the evaluations that `rtol` spends, the
mean of eight errors asked for, after a rehearsal with 64 samples (videos: 24) of the calibration seeds; and how far
errors of the worst decile, and of the median, of 64 samples (videos: 16) of the choosing seeds are below those of power
0, in dB, the mean of 7 lengths. Prints Markdown; half an hour on one core. `--field sit` takes one field alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import cases
from benchmarks.metrics import relative_error
from benchmarks.sweep import Setting, settings
from sencache import CachedField, SensitivityProfile, calibrate
from sencache.amplification import run_amplified
from sencache.conformal import tolerance_limit
from sencache.plan import sampler_name
from sencache.rehearse import TEACHERS, usual_budgets
from solvers import Stepper, integrate

POWERS = (0.0, 0.5, 1.0)
LENGTHS = 7
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
    starts = setting.start(72, "calibration")[8:], setting.start(64, "choosing")
    groups = [(setting.field(64), x) for x in starts]
    return Known(profile, ts, stepper, *(Group(f, x, integrate(f, x, ts, stepper)) for f, x in groups))


def fields() -> dict[str, Callable[[], Known]]:
    """By name."""
    every: dict[str, Callable[[], Known]] = {name: lambda name=name: trained(name) for name in cases()}  # type: ignore[misc]
    for one in settings():
        if one.name.startswith("mixture"):
            every[one.name] = lambda one=one: mixture(one)  # type: ignore[misc]
    return every


def measured(known: Known) -> Iterator[tuple[list[float], ...]]:
    """By power: of each length the limit that a rehearsal finds, and worst decile and median of the choosing seeds."""
    amplified = run_amplified(*known.rehearsed[:2], known.ts, known.stepper)[1][:TEACHERS]
    facts = {**known.profile.facts, "rehearsed": sampler_name(known.stepper, known.ts)}
    met: dict[tuple[object, ...], tuple[float, ...]] = {}
    for power in POWERS:
        profile = replace(known.profile, amplified=amplified ** (2 * power), facts=facts)
        found = []
        for nfe in usual_budgets(len(known.ts) - 1, most=LENGTHS):
            cached = [CachedField(group.field, profile, nfe=nfe) for group in (known.rehearsed, known.choosing)]
            plan = cached[0].plan(known.ts, known.stepper)
            key = plan.variable, *plan.nodes.tolist()
            if key not in met:
                own, other = (
                    relative_error(one.integrate(group.x, known.ts, known.stepper), group.full).double()
                    for one, group in zip(cached, (known.rehearsed, known.choosing), strict=True)
                )
                met[key] = tolerance_limit(own[TEACHERS:], 0.9), float(other.quantile(0.9)), float(other.median())
            found.append(met[key])
        yield tuple(map(list, zip(*found, strict=True)))


def spent(limits: list[float], steps: int) -> float:
    """The evaluations that `rtol` spends, the mean over `RTOLS`, for the limits of plans of `LENGTHS` lengths."""
    budgets, total = usual_budgets(steps, most=LENGTHS), 0
    for rtol in RTOLS:
        taken = steps
        for nfe, limit in zip(reversed(budgets), reversed(limits), strict=True):
            if limit > rtol:
                break
            taken = nfe
        total += taken
    return total / len(RTOLS)


def decibels(errors: list[float], plain: list[float]) -> float:
    """How far errors are below `plain` ones, the mean over lengths (dB)."""
    ratios = torch.tensor(plain, dtype=torch.float64) / torch.tensor(errors, dtype=torch.float64)
    return float(20 * ratios.log10().mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--field", nargs="+", choices=fields(), default=list(fields()), help="default: all")
    names = parser.parse_args().field
    torch.set_grad_enabled(False)
    print(f"| field | {' | '.join(f'power {power:g}' for power in POWERS)} |\n|---|{'---|' * len(POWERS)}")
    for name in names:
        known = fields()[name]()
        rows = list(measured(known))
        (_, *plain), steps = rows[0], len(known.ts) - 1
        cells = [f"{spent(limits, steps):.1f}; {decibels(worst, plain[0]):+.1f}, {decibels(middle, plain[1]):+.1f}"
                 for limits, worst, middle in rows]  # fmt: skip
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
