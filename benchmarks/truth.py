"""How near to the true ODE a second-order stepper comes under a plan: `python -m benchmarks.truth`, for docs/theory.md.

The mixture on three paths and grids, 32 samples of the reported seeds, PSNR (dB) to torchdiffeq's adaptive solver at
1e-5, medians: Euler and UniPC with all 50 evaluations, UniPC under plans calibrated on it, and on those plans' nodes
alone. Calibrated on 8 samples of the calibration seeds. Prints the table as Markdown.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.metrics import psnr
from benchmarks.sweep import UNIFORM, Grid, gmm, gmm_noise
from sencache import CachedField, calibrate
from solvers import VP, Linear, Path, TorchDiffEq, UniPC, grids, integrate

BUDGETS = (25, 15, 10)
SAMPLES = 32
SETTINGS: dict[str, tuple[Path, Grid]] = {
    "linear path": (Linear(), UNIFORM),
    "VP path, logarithmic": (VP(), lambda steps: grids.logarithmic(steps, 1.0, 1e-3)),
    "VP path, uniform": (VP(), lambda steps: grids.uniform(steps, 1.0, 1e-3)),
}


def cells(path: Path, grid: Grid) -> list[str]:
    ts, unipc, x = grid(50), UniPC(path), gmm_noise(SAMPLES, "reported")
    field = gmm("", path, grid).field(SAMPLES)
    truth = integrate(field, x, ts[[0, -1]], TorchDiffEq(rtol=1e-5, atol=1e-5))
    profile = calibrate(field, gmm_noise(8, "calibration"), ts, unipc, progress=False)

    def near(end: Tensor) -> str:
        return f"{psnr(end, truth).median():.1f}"

    planned, alone = [], []
    for nfe in BUDGETS:
        cached = CachedField(field, profile, nfe=nfe)
        plan = cached.plan(ts, unipc)
        planned.append(near(cached.integrate(x, ts, unipc)))
        alone.append(near(integrate(field, x, grids.through(plan.times[plan.nodes], ts[-1]), unipc)))
    all_of_them = [near(integrate(field, x, ts)), near(integrate(field, x, ts, unipc))]
    return [*all_of_them, " / ".join(planned), " / ".join(alone)]


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    budgets = " / ".join(map(str, BUDGETS))
    print(f"| | Euler, all 50 | UniPC, all 50 | UniPC under a plan of {budgets} | UniPC on the plan's nodes alone |")
    print("|---" * 5 + "|")
    for name, setting in SETTINGS.items():
        print(f"| {name} | " + " | ".join(cells(*setting)) + " |")
