"""Where few evaluations are better taken as few steps, data in narrow modes: `python -m benchmarks.modes`.

Eight Gaussians of one deviation on a ring of radius 2 in the plane, linear path, 50 Euler steps from 1 to 0.01: errors
relative to the full run's end of 256 samples of the reported seeds, medians and worst deciles, of fewer Euler steps, of
plans, calibrated on 8 samples of the calibration seeds, and of going by own differences, under tolerances that spend as
much on 64 samples of the choosing seeds. Prints the tables of docs/theory.md as Markdown.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.fields.gmm import GaussianMixture
from benchmarks.shipped import SEEDS
from benchmarks.spending import tolerance_that_spends
from sencache import CachedField, calibrate, rms
from solvers import grids, integrate

BUDGETS = (25, 15, 12, 10, 8, 6)
DEVIATIONS = (0.02, 0.05, 0.1, 0.2)
SAMPLES = 256


def ring(deviation: float, modes: int = 8, radius: float = 2.0) -> GaussianMixture:
    """The field of Gaussians on a ring."""
    angle = torch.arange(modes, dtype=torch.float64) * 2 * math.pi / modes
    alike, none = torch.ones_like(angle), torch.zeros(modes, 1, dtype=torch.float64)
    basis = torch.tensor([1.0, 0.0]).double().expand(modes, 2)[..., None]  # of directions that vary no more than others
    mean = radius * torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture(alike / modes, mean, basis, none, deviation**2 * alike)


def start(samples: int, purpose: str) -> Tensor:
    generator = torch.Generator().manual_seed(SEEDS[purpose])
    return torch.randn(samples, 2, generator=generator, dtype=torch.float64)


def grid(steps: int) -> Tensor:
    return grids.uniform(steps, 1.0, 0.01)


def errors(deviation: float, nfe: int) -> list[Tensor]:
    """Relative errors (B,) of fewer steps, and of a plan."""
    field, x, ts = ring(deviation), start(SAMPLES, "reported"), grid(50)
    profile = calibrate(field, start(8, "calibration"), ts, progress=False)
    full, ends = integrate(field, x, ts), [integrate(field, x, grid(nfe))]
    ends.append(CachedField(field, profile, nfe=nfe).integrate(x, ts))
    return [rms(end - full) / rms(full) for end in ends]


def own(deviation: float, nfe: int) -> tuple[Tensor, float]:
    """Relative errors (B,) by own differences, and the evaluations that these spend in the mean."""
    field, ts = ring(deviation), grid(50)

    def run(tolerance: float, x: Tensor) -> tuple[Tensor, float]:
        cached = CachedField(field, tolerance=tolerance)
        return cached.integrate(x, ts), float(cached.report.evaluations.double().mean())

    choosing, x = start(64, "choosing"), start(SAMPLES, "reported")
    end, spent = run(tolerance_that_spends(nfe, lambda tolerance: run(tolerance, choosing)[1], low=-12.0), x)
    full = integrate(field, x, ts)
    return rms(end - full) / rms(full), spent


def shown(errors: Tensor) -> str:
    return f"{errors.median():.2g} ({errors.quantile(0.9):.2g})"


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    print("| deviation | " + " | ".join(f"{nfe}: fewer steps | {nfe}: ours" for nfe in BUDGETS) + " |")
    print("|---" * (1 + 2 * len(BUDGETS)) + "|")
    for deviation in DEVIATIONS:
        found = [error for nfe in BUDGETS for error in errors(deviation, nfe)]
        print(f"| {deviation:g} | " + " | ".join(map(shown, found)) + " |", flush=True)
    print("\n| deviation | " + " | ".join(f"{nfe}: own differences | spent" for nfe in BUDGETS[:4]) + " |")
    print("|---" * (1 + 2 * 4) + "|")
    for deviation in DEVIATIONS:
        cells = [f"{shown(error)} | {spent:.1f}" for error, spent in (own(deviation, nfe) for nfe in BUDGETS[:4])]
        print(f"| {deviation:g} | " + " | ".join(cells) + " |", flush=True)
