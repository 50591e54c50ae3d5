"""The main job, in a minute or two: the shipped SiT sampled in full, and with a fraction of the evaluations.

make demo            or: python -m benchmarks.demo [--images 32] [--out demo.png]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor
from tqdm import tqdm

from benchmarks.metrics import psnr, relative_error, ssim
from benchmarks.shipped import GRID, GUIDANCE, STEPS, noise, sit_field, sit_profile
from sencache import CachedField, Report, SensitivityProfile, strict_start
from sencache.plots import draw_profile, draw_trace
from solvers import TorchDiffEq, grids, integrate

SLOW, FAST = 0.2, 0.6  # the paper's epsilon after the strict start, two round numbers


class Watched:
    """A field that shows its progress: one tick a sample and evaluation."""

    def __init__(self, field: Any, bar: tqdm):
        self.field, self.bar = field, bar

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.bar.update(len(x))
        return self.field(x, t)

    def select(self, rows: Tensor) -> Watched:
        return Watched(self.field.select(rows), self.bar)


class Result(NamedTuple):
    """One row of the table."""

    name: str
    images: Tensor  # (B, 1, 32, 32)
    evaluations: float  # mean over the samples
    seconds: float
    report: Report | None


@contextmanager
def watched(field: Any, name: str) -> Iterator[Watched]:
    with tqdm(desc=f"{name:<34}", unit=" eval", leave=False) as bar:
        yield Watched(field, bar)


def run(name: str, field: Any, sample: Callable[[Any], tuple[Tensor, Report | None]], evaluations: float = 0) -> Result:
    start = time.perf_counter()
    with watched(field, name) as seen:
        images, report = sample(seen)
    spent = time.perf_counter() - start
    paid = float(report.evaluations.double().mean()) if report else evaluations
    return Result(name, images, paid, spent, report)


def main(count: int, out: str) -> None:
    field, profile, x = sit_field(count), sit_profile(), noise(count, "reported")

    def plain(name: str, steps: int) -> Result:
        return run(name, field, lambda f: (integrate(f, x, grids.uniform(steps)), None), steps)

    def cached(name: str, profile: SensitivityProfile | None, **options: Any) -> Result:
        def sample(f: Any) -> tuple[Tensor, Report]:
            c = CachedField(f, profile, **options)
            return c.integrate(x, GRID), c.report

        return run(name, field, sample)

    sample_truth = TorchDiffEq("dopri5", rtol=1e-4, atol=1e-4)
    truth = run("true ODE (dopri5)", field, lambda f: (integrate(f, x, torch.tensor([1.0, 0.0]), sample_truth), None))
    full = plain(f"all {STEPS} evaluations", STEPS)
    results = [full]
    for epsilon, n in ((SLOW, 2), (FAST, 3)):
        paper = {"tolerance": strict_start(GRID, epsilon), "max_reuses": n, "reuse": "hold"}
        rule = cached(f"paper's rule, epsilon={epsilon}, n={n}", profile, **paper)
        nfe = round(rule.evaluations)
        results += [rule, plain(f"Euler with {nfe} steps", nfe), cached(f"sencache, nfe={nfe}", profile, nfe=nfe)]
    results += [cached("sencache, nfe=10", profile, nfe=10), plain("Euler with 10 steps", 10)]
    results.append(cached("no profile, tolerance=0.003", None, tolerance=0.003))
    print_table(results, full, truth.images)
    draw(results, full, profile, out)
    print(f"\n{out}: the images side by side, the decisions, the sensitivities.\n\n{advice(results, full)}")


def print_table(results: list[Result], full: Result, truth: Tensor) -> None:
    print(
        f"\n{len(full.images)} images of the shipped SiT (Fashion-MNIST, guidance {GUIDANCE:g}), unseen in calibration."
    )
    print(
        "PSNR and SSIM against all evaluations: median, worst image. Error against the true ODE: relative RMS, median."
    )
    heads = (
        f"{'':<40}{'evaluations':>12}{'cached':>8}{'PSNR dB':>15}{'SSIM':>16}{'error':>8}{'seconds':>9}{'speed-up':>10}"
    )
    print(f"\n{heads}")
    for row in results:
        p, s = psnr(row.images, full.images), ssim(row.images, full.images)
        quality = f"{p.median():8.1f} {p.min():6.1f}{s.median():9.4f} {s.min():6.4f}" if row is not full else " " * 31
        error = relative_error(row.images, truth).median()
        print(
            f"{row.name:<40}{row.evaluations:12.1f}{1 - row.evaluations / STEPS:8.0%}{quality}{error:8.4f}"
            f"{row.seconds:9.1f}{full.seconds / row.seconds:9.2f}x"
        )


def advice(results: list[Result], full: Result) -> str:
    """What to do, from the numbers above."""
    names = "sencache, nfe=10", "paper", "Euler"
    ours, rule, fewer = (next(row for row in results if row.name.startswith(name)) for name in names)
    near, far, free = (psnr(row.images, full.images).median().item() for row in (ours, rule, fewer))
    verdict = "does not beat" if far < free else "beats"
    paid = round(rule.evaluations)
    return (
        f"At {paid} evaluations the paper's rule ({far:.1f} dB) {verdict} taking fewer steps ({free:.1f} dB).\n"
        f"So: calibrate once, and `CachedField(field, profile, nfe=10).integrate(x_T, ts)` is at {near:.1f} dB for 10."
    )


def draw(results: list[Result], full: Result, profile: SensitivityProfile, out: str) -> None:
    shown = 10
    figure = plt.figure(figsize=(13, 0.95 * len(results) + 4.2), layout="constrained")
    top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=[0.95 * len(results), 4]))
    for axes, row in zip(top.subplots(len(results), 1), results, strict=True):
        strip = torch.cat(list(row.images[:shown, 0].cpu()), dim=1)
        axes.imshow(strip.clamp(-1, 1), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_axis_off()
        quality = psnr(row.images, full.images).median()
        label = row.name if row is full else f"{row.name}\n{row.evaluations:.1f} evaluations, {quality:.1f} dB"
        axes.text(-8, 16, label, ha="right", va="center", fontsize=9)
    left, right = bottom.subplots(1, 2, width_ratios=[1.4, 1])
    draw_trace(left, {row.name: row.report for row in results if row.report})
    left.set_title("what was evaluated (dark) and reused (light)", fontsize=10)
    draw_profile(right, profile)
    right.set_title("sensitivities, 8 calibration samples and their range", fontsize=10)
    figure.savefig(out, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="how many images to sample (default 32)")
    parser.add_argument("--out", default="demo.png", help="where the picture goes (default demo.png)")
    options = parser.parse_args()
    main(options.images, options.out)
