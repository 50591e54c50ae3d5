"""How good is the schedule? Ours beside an oracle that knows each sample's own outputs, and beside the paper's rule.

    python -m benchmarks.oracle [--images 64]

The oracle makes a plan for every sample alone from the Gram matrix of that sample's own full run, with the same reuse
and correction: what schedules could at best gain from knowing everything beforehand. Once it goes by what each gap
leaves alone, the shortest path; and once polished too, by how the sample's gaps cancel. Then the fewest evaluations
with which ours is as close to the full run as the paper's rule with 25 and 30, and what is lost where only every third
step is calibrated, at one evaluation each. Reported seeds; tolerances chosen on others.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.metrics import psnr
from benchmarks.shipped import GRID, noise, sit_field, sit_profile
from benchmarks.table import BUDGETS, tolerance_for
from sencache import CachedField, calibrate
from sencache.expected import Errors
from solvers import integrate


def by_oracle(images: int, nfe: int, polished: bool) -> Tensor:
    """The ends (images, ...) of runs whose plan each sample's own outputs made."""
    field, x, profile = sit_field(images), noise(images, "reported"), sit_profile()
    ends = []
    for k in tqdm(range(images), desc=f"oracle, {nfe}", leave=False):
        one, start = field.select(torch.tensor([k])), x[k : k + 1]
        if k not in grams:
            grams[k] = calibrate(one, start, GRID, secants=False, progress=False).gram
        own = replace(profile, gram=grams[k])
        with nullcontext() if polished else patch.object(Errors, "polished", lambda self, path: path):
            ends.append(CachedField(one, own, nfe=nfe).integrate(start, GRID))
    return torch.cat(ends)


grams: dict[int, Tensor | None] = {}  # of each sample, measured once

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="how many samples to report on (default 64)")
    images = parser.parse_args().images
    torch.set_grad_enabled(False)
    field, x, profile = sit_field(images), noise(images, "reported"), sit_profile()
    full = integrate(field, x, GRID)

    def ours(nfe: int) -> Tensor:
        return psnr(CachedField(field, profile, nfe=nfe).integrate(x, GRID), full)

    print("| evaluations | ours: median PSNR (dB) | oracle of gaps | ahead by | SE | polished oracle | ahead by | SE |")
    print("|---" * 8 + "|")
    for nfe in BUDGETS:
        near, cells = ours(nfe), ""
        for polished in (False, True):
            best = psnr(by_oracle(images, nfe, polished), full)
            gap = best - near
            cells += f" {best.median():.1f} | {gap.median():+.1f} | {gap.std() / images**0.5:.1f} |"
        print(f"| {nfe} | {near.median():.1f} |{cells}", flush=True)
    few = {nfe: float(ours(nfe).median()) for nfe in range(3, 13)}
    print("\n| the paper's rule, n = 3, at | its median PSNR (dB) | ours is as close with | at |\n|---|---|---|---|")
    for nfe in (25, 30):
        rule: dict[str, Any] = {"profile": profile, "max_reuses": 3, "reuse": "hold"}
        cached = CachedField(field, **rule, tolerance=tolerance_for(nfe, rule))
        reached = float(psnr(cached.integrate(x, GRID), full).median())
        spent = float(cached.report.evaluations.double().mean())
        least = min((n for n, value in few.items() if value >= reached), default=None)
        told = "more than 12 | " if least is None else f"{least} | {few[least]:.1f}"
        print(f"| {spent:.1f} | {reached:.1f} | {told} |", flush=True)
    third = torch.cat([GRID[:-1:3], GRID[-1:]])
    start = noise(8, "calibration")
    coarse = calibrate(sit_field(8), start, third, secants=False, progress=False)
    print(f"\n| evaluations | calibrated on {len(third) - 1} of 50 steps | on all |\n|---|---|---|")
    for nfe in BUDGETS:
        few_steps = psnr(CachedField(field, coarse, nfe=nfe).integrate(x, GRID), full)
        print(f"| {nfe} | {few_steps.median():.1f} | {ours(nfe).median():.1f} |", flush=True)
