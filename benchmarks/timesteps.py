"""25 of 250 SDE steps, chosen by sensitivity or not (Section 4.2 and Fig. 3b of the paper), on the shipped SiT.

    python -m benchmarks.timesteps [--images 128]

Every method is driven by the same Brownian path and compared with all 250 steps of Euler-Maruyama (diffusion "sigma").
Four walk a coarse grid of 25 of the fine grid's times: uniform; equal sensitivity, so that between two of them S adds
up to the same; equal square root of sensitivity times amplification, the amplification being how much a disturbance at
t has grown at the end; the nodes of our plan. Two walk the fine grid with its fine noise, and evaluate 25 times:
holding, and ours. Calibration, with 8 samples, is on seeds of its own. Prints a table, writes docs/timesteps.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from torch import Tensor

from benchmarks.metrics import psnr
from benchmarks.shipped import noise, sit_field, sit_profile
from sencache import CachedField, SensitivityProfile, calibrate, rms
from solvers import BrownianPath, EulerMaruyama, Linear, grids, integrate

STEPS, CHOSEN, CALIBRATED = 250, 25, 8
GRID = grids.uniform(STEPS)
COARSE = range(0, STEPS, STEPS // 25)  # where amplification is measured
PICTURE = Path(__file__).parent.parent / "docs/timesteps.png"


def sde(x: Tensor, seed: int) -> EulerMaruyama:
    """The sampler of x (B, ...), with a Brownian path of its own on the fine grid."""
    return EulerMaruyama(Linear(), BrownianPath(x, GRID.float(), torch.Generator(x.device).manual_seed(seed)))


def sensitivity(profile: SensitivityProfile) -> Tensor:
    """||J_x|| ||v|| + ||J_t||, the rate of S along a trajectory, at the start of each step, (K,)."""
    t = GRID[:-1].clamp(float(profile.t.min()), float(profile.t.max()))
    alpha_x, alpha_t = profile.lookup(t)
    speed = profile.gram_at(t).diagonal(dim1=1, dim2=2).mean(0).sqrt()
    return alpha_x * speed + alpha_t


def amplification() -> Tensor:
    """How much larger a small random disturbance of the state at each step is at the end, (K,), the median of 8."""
    field, x = sit_field(CALIBRATED), noise(CALIBRATED, "calibration")
    stepper, ts = sde(x, 1), GRID.float()
    grown, states = [], {}
    for k, (t, t_next) in enumerate(pairwise(ts)):
        states[k] = x
        x = x + stepper.advance(field, x, t, t_next, None)[0]
    for k in COARSE:
        push = 1e-2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(k)).to(x)
        disturbed = integrate(field, states[k] + push, ts[k:], stepper)
        grown.append(float((rms(disturbed - x) / rms(push)).median()))
    at, known = torch.arange(STEPS), torch.tensor(COARSE)
    right = torch.searchsorted(known, at, right=True).clamp(max=len(known) - 1)
    left = (right - 1).clamp(min=0)
    share = ((at - known[left]) / (known[right] - known[left])).clamp(0, 1)
    values = torch.tensor(grown, dtype=torch.float64)
    return torch.lerp(values[left], values[right], share.double())


def equal_shares(density: Tensor) -> Tensor:
    """`CHOSEN` of the K steps, in order, between which a density (K,) adds up to equal shares."""
    before = (density.cumsum(0) - density) / density.sum()
    chosen = torch.searchsorted(before, torch.arange(CHOSEN) / CHOSEN)
    for k in range(1, CHOSEN):  # no step twice
        chosen[k] = max(chosen[k], chosen[k - 1] + 1)
    return chosen.clamp(max=STEPS - CHOSEN + torch.arange(CHOSEN))


def draw(results: dict[str, tuple[Tensor, Tensor]], curves: dict[str, Tensor], images: int) -> None:
    sizes = {"width_ratios": (1, 1.3), "height_ratios": (1, 2.4)}
    figure, axes = plt.subplot_mosaic(".c;et", figsize=(12, 5), layout="constrained", gridspec_kw=sizes)
    error, times, above = axes["e"], axes["t"], axes["c"]
    names = list(results)
    error.boxplot([near.numpy() for _, near in results.values()], orientation="horizontal", whis=(10, 90), sym="")
    error.set_yticks(range(1, len(names) + 1), names)
    error.set_xlabel(f"PSNR to all 250 steps (dB):\nmedian, quartiles, deciles of {images} images")
    for row, (chosen, _) in enumerate(results.values(), 1):
        times.plot(GRID[chosen], torch.full(chosen.shape, row), "|", ms=13, mew=1.6)
    times.set_yticks(range(1, len(names) + 1), [])
    for axis in (times, error):
        axis.set_ylim(0.4, len(names) + 0.6)
    times.set_xlabel("the 25 times of each, from noise (t = 1) to data (t = 0)")
    for (name, curve), style in zip(curves.items(), ("-", "--"), strict=True):
        above.semilogy(GRID[:-1], curve, style, color="0.3", lw=1.2, label=name)
    above.legend(frameon=False, fontsize=8)
    for axis in (times, above):
        axis.set_xlim(1.02, -0.02)
    figure.savefig(PICTURE, dpi=120)


def main(images: int) -> None:
    torch.set_grad_enabled(False)
    few, some = sit_field(CALIBRATED), noise(CALIBRATED, "calibration")
    profile = calibrate(few, some, GRID.float(), sde(some, 0), secants=False)
    rate, growth = sensitivity(sit_profile()), amplification()
    field, x = sit_field(images), noise(images, "reported")
    stepper = sde(x, 2)
    full = integrate(field, x, GRID.float(), stepper)

    def coarse(chosen: Tensor) -> tuple[Tensor, Tensor]:
        return chosen, integrate(field, x, torch.cat([GRID[chosen], GRID[-1:]]).float(), stepper)

    def cached(**options: object) -> tuple[Tensor, Tensor]:
        made = CachedField(field, profile, nfe=CHOSEN, **options)  # type: ignore[arg-type]
        return made.plan(GRID.float(), stepper).nodes, made.integrate(x, GRID.float(), stepper)

    methods: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "uniform": lambda: coarse(torch.arange(0, STEPS, STEPS // CHOSEN)),
        "equal sensitivity (paper)": lambda: coarse(equal_shares(rate)),
        "equal sqrt(sensitivity x amplification)": lambda: coarse(equal_shares((rate * growth).sqrt())),
        "the plan's nodes": lambda: coarse(cached()[0]),
        "fine noise, best schedule, held": lambda: cached(reuse="hold", correct=False),
        "fine noise, ours": lambda: cached(),
    }
    results = {}
    print("| 25 of 250 steps | PSNR to all 250 (dB): median | worst decile | SE |\n|---|---|---|---|")
    for name, method in methods.items():
        chosen, end = method()
        near = psnr(end, full)
        results[name] = chosen, near
        print(
            f"| {name} | {near.median():.1f} | {near.quantile(0.1):.1f} | {near.std() / images**0.5:.1f} |", flush=True
        )
    draw(results, {"sensitivity": rate, "amplification": growth}, images)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128, help="how many images to report on (default 128)")
    main(parser.parse_args().images)
