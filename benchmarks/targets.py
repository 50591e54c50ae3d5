"""Errors asked for and errors met on the shipped SiT: `rehearse` on 32 samples, `rtol` on others.

    python -m benchmarks.targets [--images 64]

Prints the factors that rehearsal found and, for each `rtol`, the evaluations spent, the share of samples at or under it
and the median of achieved / asked, as Markdown.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.metrics import relative_error
from benchmarks.shipped import GRID, noise, sit_field, sit_profile
from sencache import CachedField, rehearse
from solvers import integrate

REHEARSED = 32

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="how many samples to report on (default 64)")
    images = parser.parse_args().images
    torch.set_grad_enabled(False)
    profile = rehearse(sit_field(REHEARSED), sit_profile(), noise(8 + REHEARSED, "calibration")[8:], GRID)
    assert profile.budgets is not None
    assert profile.factors is not None
    print("| evaluations | error / expected: median | 90 % quantile, conformal |\n|---|---|---|")
    for budget, factors in zip(profile.budgets.tolist(), profile.factors, strict=True):
        print(f"| {budget} | {factors.median():.2f} | {profile.factor(budget):.2f} |")
    field, x = sit_field(images), noise(images, "reported")
    full = integrate(field, x, GRID)
    print("\n| `rtol` | evaluations | samples at or under it | achieved / asked, median |\n|---|---|---|---|")
    for rtol in (0.05, 0.02, 0.01, 0.005, 0.002):
        cached = CachedField(field, profile, rtol=rtol)
        error = relative_error(cached.integrate(x, GRID), full)
        spent, kept = int(cached.report.evaluations.max()), (error <= rtol).double().mean()
        print(f"| {rtol} | {spent} | {kept:.0%} | {error.median() / rtol:.2f} |")
