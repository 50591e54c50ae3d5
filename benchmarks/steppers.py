"""What reuse gains for each stepper, on a shipped field: PSNR to the same stepper with all its 50 evaluations.

    python -m benchmarks.steppers [--field sit|mixture] [--images 16]

Four ways to pay for 25 and for 15 of 50 evaluations: fewer steps, uniform too; and the best plans that hold, that
continue lines, and that continue lines and repay. Heun takes 25 steps of two evaluations; Euler-Maruyama is driven by
one Brownian path on all grids. Every stepper is calibrated on 8 samples of the calibration seeds; the numbers are of
the reported ones. Prints the table as Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.fields.gmm import GaussianMixture
from benchmarks.metrics import psnr
from benchmarks.shipped import DEVICE, FIELDS, GRID, SEEDS, noise, sit_field
from benchmarks.sweep import gmm_noise
from sencache import CachedField, calibrate
from solvers import BrownianPath, DPMSolverPP, Euler, EulerMaruyama, Heun, Linear, Stepper, UniPC, integrate

BUDGETS = (25, 15)
PATH = Linear()
WAYS = {
    "holding": {"reuse": "hold"},
    "lines": {"correct": False},
    "lines, repaid": {"correct": True},
}


def mixture(samples: int) -> GaussianMixture:
    """The mixture of Gaussians on the linear path, for any number of samples."""
    return GaussianMixture.load(FIELDS / "gmm.safetensors", PATH).to(DEVICE)


ON: dict[str, tuple[Callable[[int], Any], Callable[[int, str], Tensor]]] = {
    "sit": (sit_field, noise),
    "mixture": (mixture, gmm_noise),
}


def brownian(x: Tensor) -> Stepper:
    """Euler-Maruyama on a path of its own for states like x, the same in every run."""
    return EulerMaruyama(PATH, BrownianPath(x, GRID, torch.Generator().manual_seed(SEEDS["reported"])))


STEPPERS: dict[str, Callable[[Tensor], Stepper]] = {
    "Euler": lambda x: Euler(),
    "Heun": lambda x: Heun(),
    "DPM-Solver++ 1 (DDIM)": lambda x: DPMSolverPP(PATH, 1),
    "DPM-Solver++ 2M": lambda x: DPMSolverPP(PATH),
    "UniPC": lambda x: UniPC(PATH),
    "Euler-Maruyama": brownian,
}


def among(steps: int) -> Tensor:
    """A grid of that many steps, as even as the times of the full one allow."""
    return GRID[torch.linspace(0, len(GRID) - 1, steps + 1).round().long()]


def cells(on: str, make: Callable[[Tensor], Stepper], images: int) -> list[str]:
    """Median and worst decile (dB) of every way at every budget."""
    field_of, start = ON[on]
    few, x, field = start(8, "calibration"), start(images, "reported"), field_of(images)
    stepper = make(x)
    stages = 2 if isinstance(stepper, Heun) else 1
    ts = among((len(GRID) - 1) // stages)
    profile = calibrate(field_of(8), few, ts, make(few), progress=False)
    full = integrate(field, x, ts, stepper)
    found = []
    for nfe in BUDGETS:
        ends = [integrate(field, x, among(nfe // stages), stepper)]
        ends += [CachedField(field, profile, nfe=nfe, **way).integrate(x, ts, stepper) for way in WAYS.values()]  # type: ignore[arg-type]
        near = [psnr(end, full) for end in ends]
        found += [f"{value.median():.1f} ({value.quantile(0.1):.1f})" for value in near]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16, help="how many images to report on (default 16)")
    parser.add_argument("--field", choices=ON, default="sit", help="the trained SiT (default) or the exact mixture")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    heads = [f"{nfe}: {way}" for nfe in BUDGETS for way in ("fewer steps", *WAYS)]
    print(f"| stepper | {' | '.join(heads)} |\n" + "|---" * (len(heads) + 1) + "|")
    for name, make in tqdm(STEPPERS.items()):
        print(f"| {' | '.join([name, *cells(args.field, make, args.images)])} |", flush=True)
