"""What long gaps do on a stiff field, dx/dt = r (x - cos 5t) with t falling: `python -m benchmarks.stiff`.

Relative errors to 50 Euler steps, medians of 64 samples of the reported seeds, calibrated on 8 of the calibration
seeds: of fewer Euler steps; of plans, and what these expected; and of plans made as if nothing could grow, and what
those expected. ||J_x|| is r everywhere. Prints the table of docs/theory.md as Markdown.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.echoes import states
from sencache import CachedField, calibrate
from sencache.expected import Errors
from sencache.norms import rms
from sencache.schedule import DAMPED, STABLE
from solvers import VelocityField, grids, integrate

BUDGETS = (25, 20, 15, 12, 10, 8)
RATES = (4.0, 6.0, 8.0, 10.0, 14.0, 20.0, 30.0)
GRID = grids.uniform(50)


def stiff(rate: float) -> VelocityField:
    return lambda x, t: rate * (x - torch.cos(5 * t))


def errors(rate: float, nfe: int, samples: int) -> list[float]:
    """Of fewer steps; of a plan, made and expected; of one that knows of no unstable gaps, made and expected."""
    field, x = stiff(rate), states(samples, "reported")
    profile = calibrate(field, states(8, "calibration"), GRID, progress=False)
    full = integrate(field, x, GRID)

    def off(end: Tensor) -> float:
        return float((rms(end - full) / rms(full)).median())

    found = [off(integrate(field, x, grids.uniform(nfe)))]
    unlimited, unchecked = dict.fromkeys(STABLE, math.inf), patch.object(Errors, "growth", lambda self, nodes: 1.0)
    for limits in ((), (patch.dict(STABLE, unlimited), patch.dict(DAMPED, unlimited), unchecked)):
        with ExitStack() as stack:
            for limit in limits:
                stack.enter_context(limit)
            cached = CachedField(field, profile, nfe=nfe)
            found += [off(cached.integrate(x, GRID)), cached.report.expected]
    return found


def main(samples: int = 64) -> None:
    print("| r | evaluations | fewer steps | ours | expected | without the limit | expected |\n" + "|---" * 7 + "|")
    for rate in RATES:
        for nfe in BUDGETS:
            print(f"| {rate:g} | {nfe} | " + " | ".join(f"{value:.2g}" for value in errors(rate, nfe, samples)) + " |")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
