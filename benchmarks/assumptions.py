"""The two numbers of `assumed` profiles beside others, on the trained fields: `python -m benchmarks.assumptions`.

Plans of assumed profiles of every median and spread, less those of the shipped calibrated profile: PSNR (dB) to the
full run, median over 24 images or 6 videos of the choosing seeds, then the mean and the worst of 8 budgets. Beside them
the two that ship, taken for a measurement, which has plans polished. Prints the table of docs/theory.md as Markdown;
takes half an hour on one core. `--field sit` takes one field alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import torch

from benchmarks.cases import Case, cases
from benchmarks.metrics import psnr
from sencache import CachedField, SensitivityProfile, assumed
from sencache.assume import MEDIAN, SPREAD
from solvers import integrate

BUDGETS = (10, 12, 14, 15, 17, 20, 22, 25)
PAIRS = [(median, spread) for median in (0.1, 0.2, 0.4) for spread in (1.0, 1.5, 2.0, 2.5)]


class Quality:
    """The PSNR (dB) of a case's plans, median over samples of the choosing seeds; each plan is run once."""

    def __init__(self, case: Case):
        self.case, self.ts = case, case.grid()
        self.field, self.x, _ = case.samples(24 if case.name == "sit" else 6, "choosing")
        self.full = case.pixels(integrate(self.field, self.x, self.ts, case.stepper))
        self.known: dict[tuple[object, ...], float] = {}

    def of(self, profile: SensitivityProfile, nfe: int) -> float:
        cached = CachedField(self.field, profile, nfe=nfe)
        plan = cached.plan(self.ts, self.case.stepper)
        key = plan.variable, *plan.nodes.tolist()
        if key not in self.known:
            end = cached.integrate(self.x, self.ts, self.case.stepper)
            self.known[key] = float(psnr(self.case.pixels(end), self.full).median())
        return self.known[key]


def profiles(case: Case) -> Iterator[tuple[str, SensitivityProfile]]:
    """In words and as a profile, everything that is assumed."""
    for median, spread in PAIRS:
        with mock.patch.multiple("sencache.assume", MEDIAN=median, SPREAD=spread):
            yield f"{median:g}, {spread:g}", assumed(case.path, case.grid())
    yield f"{MEDIAN:g}, {SPREAD:g}, polished", replace(assumed(case.path, case.grid()), facts={})


def differences(case: Case) -> dict[str, list[float]]:
    """What is missing to calibration at each of `BUDGETS`, negative (dB), by what is assumed."""
    quality = Quality(case)
    calibrated = [quality.of(case.profile, nfe) for nfe in BUDGETS]
    return {
        name: [quality.of(profile, nfe) - own for nfe, own in zip(BUDGETS, calibrated, strict=True)]
        for name, profile in profiles(case)
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--field", nargs="+", choices=cases(), default=list(cases()), help="default: all four")
    names = parser.parse_args().field
    torch.set_grad_enabled(False)
    found = {name: differences(cases()[name]) for name in names}
    print(f"| median, spread | {' | '.join(names)} | mean |\n|---|{'---|' * len(names)}---|")
    for row in found[names[0]]:
        every = [torch.tensor(found[name][row]) for name in names]
        cells = [f"{each.mean():.1f} ({each.min():.1f})" for each in every]
        print(f"| {row} | {' | '.join(cells)} | {torch.stack(every).mean():.1f} |")
