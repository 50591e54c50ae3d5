"""What plans gain from what a solver with a history makes of outputs on the way: `python -m benchmarks.histories`.

PSNR (dB) to all 50 evaluations, medians and worst deciles of the reported seeds, calibrated on 8 samples of the
calibration seeds: of plans that take the states of the way to weigh outputs as the end does, and of ours. Gaussian data
of 64 directions whose scales are log-normal around .2, the mixture, and the SiT. Prints the table of docs/theory.md as
Markdown; takes five minutes on one core.
"""

from __future__ import annotations

from contextlib import nullcontext
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.metrics import psnr
from benchmarks.shipped import SEEDS
from benchmarks.sweep import Setting, gmm, sit
from sencache import CachedField, calibrate
from sencache.influence import Response
from solvers import VP, DPMSolverPP, Linear, Stepper, UniPC, grids, integrate

BUDGETS = (25, 20, 15, 10)
SAMPLES = 64
PATH, DIRECTIONS = VP(), 64


def to_the_end(steps: int) -> Tensor:
    """A grid whose last step is long in log-SNR."""
    return grids.uniform(steps, 1.0, 1e-3)


def gaussian(spread: float, stepper: Stepper) -> Setting:
    """Data whose directions have scales around .2, the deviation of whose logarithm is `spread`, in closed form."""
    quantiles = (torch.arange(DIRECTIONS, dtype=torch.float64) + 0.5) / DIRECTIONS
    scale = 0.2 * (spread * torch.special.ndtri(quantiles)).exp()

    def field(x: Tensor, t: Tensor | float) -> Tensor:
        alpha, sigma, dalpha, dsigma = (part.double() for part in PATH.coefficients(t))
        return (alpha * dalpha * scale**2 + sigma * dsigma) / (alpha**2 * scale**2 + sigma**2) * x

    def start(samples: int, purpose: str) -> Tensor:
        generator = torch.Generator().manual_seed(SEEDS[purpose])
        return torch.randn(samples, DIRECTIONS, generator=generator, dtype=torch.float64)

    return Setting(f"Gaussian, spread {spread:g}, VP", lambda samples: field, start, to_the_end, 50, stepper, PATH)


def settings() -> list[Setting]:
    """Fields and grids, each with UniPC and with DPM-Solver++."""
    found = []
    for stepper in (UniPC(PATH), DPMSolverPP(PATH)):
        found += [gaussian(spread, stepper) for spread in (0.5, 1.0, 1.5)]
        found += [gmm("VP path, uniform grid", PATH, to_the_end, stepper)]
        found += [gmm("VP path, logarithmic grid", PATH, lambda steps: grids.logarithmic(steps, 1.0, 1e-3), stepper)]
    for stepper in (UniPC(Linear()), DPMSolverPP(Linear())):
        found += [gmm("linear path", Linear(), grids.uniform, stepper), sit("as shipped", stepper=stepper)]
    return found


def row(setting: Setting) -> list[str]:
    """PSNR without and with it at every budget, medians and worst deciles."""
    ts, stepper = setting.grid(setting.steps), setting.stepper
    profile = calibrate(setting.field(8), setting.start(8, "calibration"), ts, stepper, progress=False)
    field, x = setting.field(SAMPLES), setting.start(SAMPLES, "reported")
    full, cells = integrate(field, x, ts, stepper), []
    for nfe in BUDGETS:
        for knows in (False, True):
            with nullcontext() if knows else patch.object(Response, "mixed", False):
                near = psnr(CachedField(field, profile, nfe=nfe).integrate(x, ts, stepper), full)
            cells.append(f"{near.median():.1f} ({near.quantile(0.1):.1f})")
    return cells


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    print("| field | solver | " + " | ".join(f"{nfe}: as in the end | {nfe}: ours" for nfe in BUDGETS) + " |")
    print("|---" * (2 + 2 * len(BUDGETS)) + "|")
    for setting in settings():
        print(f"| {setting.name} | {type(setting.stepper).__name__} | {' | '.join(row(setting))} |", flush=True)
