"""The shipped SiT at equal evaluations: the paper's rule, the free baselines, and ours.

    python -m benchmarks.table [--images 256]

Writes benchmarks/results/sit.csv and docs/work_precision.png, and prints the table as Markdown. A rule with a
tolerance is given the one that spends the wanted evaluations on the choosing seeds; all numbers are of the reported.
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from torch import Tensor
from tqdm import tqdm

from benchmarks.metrics import psnr
from benchmarks.shipped import GRID, STEPS, noise, sit_field, sit_profile
from benchmarks.spending import tolerance_that_spends
from sencache import CachedField, assumed, calibrate
from solvers import DPMSolverPP, Euler, Linear, Stepper, TorchDiffEq, UniPC, grids, integrate

BUDGETS = (25, 20, 15, 10)
ROOT = Path(__file__).parent.parent
PATH = Linear()
EULER, UNIPC = Euler(), UniPC(PATH)
FINE = grids.uniform(2 * STEPS)  # under a cache steps are free


class Row(NamedTuple):
    """One line of the table, in dB: median, worst decile and worst sample; `se` is the standard error of the mean."""

    method: str
    nfe: int
    evaluations: float
    psnr: float
    psnr_p10: float
    psnr_worst: float
    psnr_se: float
    psnr_true: float
    psnr_true_p10: float


class Bench:
    """The samples that are reported, what they should have been, and the ways to make them."""

    def __init__(self, images: int):
        self.field, self.x, self.profile = sit_field(images), noise(images, "reported"), sit_profile()
        self.fine = calibrate(sit_field(8), noise(8, "calibration"), FINE, UNIPC, progress=False)
        self.full = integrate(self.field, self.x, GRID)
        self.truth = integrate(self.field, self.x, torch.tensor([1.0, 0.0]), TorchDiffEq(rtol=1e-4, atol=1e-4))

    def row(self, method: str, nfe: int, end: Tensor, evaluations: float) -> Row:
        near, true = psnr(end, self.full), psnr(end, self.truth)
        statistics = near.median(), near.quantile(0.1), near.min(), near.std() / math.sqrt(len(near))
        values = [float(value) for value in (*statistics, true.median(), true.quantile(0.1))]
        return Row(method, nfe, round(evaluations, 2), *(round(value, 2) for value in values))

    def plain(self, method: str, grid: Tensor, stepper: Stepper) -> Row:
        return self.row(method, len(grid) - 1, integrate(self.field, self.x, grid, stepper), len(grid) - 1)

    def cached(
        self, method: str, budget: int, options: dict[str, Any], stepper: Stepper = EULER, grid: Tensor = GRID
    ) -> Row:
        field = CachedField(self.field, **options)
        end = field.integrate(self.x, grid, stepper)
        return self.row(method, budget, end, float(field.report.evaluations.double().mean()))


def tolerance_for(nfe: int, options: dict[str, Any], samples: int = 16) -> float:
    """The tolerance under which `nfe` evaluations are spent on average over samples of the choosing seeds."""
    field, x = sit_field(samples), noise(samples, "choosing")

    def spent(tolerance: float) -> float:
        cached = CachedField(field, **options, tolerance=tolerance)
        cached.integrate(x, GRID)
        return float(cached.report.evaluations.double().mean())

    return tolerance_that_spends(nfe, spent, low=-7.0)


def rows_of(bench: Bench, nfe: int) -> list[Row]:
    """Everybody at one budget."""
    profile, uniform = bench.profile, grids.uniform(nfe)
    inner = grids.log_snr(nfe - 2, PATH, 1 - 1 / nfe, 1 / nfe)
    log_snr = torch.cat([torch.ones(1), inner, torch.zeros(1)])
    plan = CachedField(bench.field, profile, nfe=nfe).plan(GRID)
    nodes = grids.through(plan.times[plan.nodes], 0.0)
    n = 3 if nfe > 12 else math.inf  # of 50 evaluations, n = 3 leaves at least 13
    rule = {"profile": profile, "max_reuses": n, "reuse": "hold"}
    ours = {"profile": profile, "nfe": nfe}
    return [
        bench.cached(f"paper's rule, n = {n}", nfe, {**rule, "tolerance": tolerance_for(nfe, rule)}),
        bench.plain("Euler, fewer steps", uniform, EULER),
        bench.plain("DPM-Solver++ 2M, fewer steps", uniform, DPMSolverPP(PATH)),
        bench.plain("UniPC, fewer steps", uniform, UNIPC),
        bench.plain("UniPC, log-SNR grid", log_snr, UNIPC),
        bench.plain("UniPC on the plan's nodes", nodes, UNIPC),
        bench.cached("ours", nfe, ours),
        bench.cached("ours without correction", nfe, {**ours, "correct": False}),
        bench.cached("ours, holding and correcting", nfe, {**ours, "reuse": "hold", "correct": True}),
        bench.cached("ours without calibration", nfe, {"tolerance": tolerance_for(nfe, {})}),
        bench.cached("ours, profile assumed", nfe, {"profile": assumed(PATH, GRID), "nfe": nfe}),
        bench.cached("ours on UniPC", nfe, ours, UNIPC),
        bench.cached("ours on UniPC, 100 steps", nfe, {"profile": bench.fine, "nfe": nfe}, UNIPC, FINE),
    ]


def print_markdown(rows: list[Row]) -> None:
    print(
        "\n| method | NFE | PSNR to 50 Euler steps: median | worst decile | worst | SE | PSNR to the true ODE: median |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        near = (row.psnr, row.psnr_p10, row.psnr_worst, row.psnr_se, row.psnr_true)
        print(f"| {row.method} | {row.evaluations:g} | " + " | ".join(f"{value:.1f}" for value in near) + " |")


def draw(rows: list[Row], images: int) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained", sharex=True)
    methods = list(dict.fromkeys(row.method.split(", n =")[0] for row in rows if row.nfe < STEPS))
    for name in methods:
        mine = [row for row in rows if row.method.startswith(name) and (row.method == name or "n =" in row.method)]
        style = (
            {"lw": 2.2, "marker": "o"} if name.startswith("ours") else {"lw": 1.2, "ls": "--", "marker": "s", "ms": 4}
        )
        for axis, value in zip(axes, ("psnr", "psnr_true"), strict=True):
            axis.plot([row.evaluations for row in mine], [getattr(row, value) for row in mine], label=name, **style)
    axes[0].set_title("to the same sampler with all 50 evaluations")
    axes[1].set_title("to the true ODE")
    for axis in axes:
        axis.set_xlabel("evaluations a sample")
        axis.set_ylabel(f"PSNR, median of {images} images (dB)")
        axis.grid(alpha=0.3)
    axes[1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(ROOT / "docs/work_precision.png", dpi=120)


def main(images: int) -> None:
    torch.set_grad_enabled(False)
    bench = Bench(images)
    itself = bench.row("all evaluations, Euler", STEPS, bench.full, STEPS)
    rows = [
        itself._replace(psnr_p10=math.inf, psnr_se=0.0),
        bench.plain("all evaluations, UniPC", GRID, UNIPC),
    ]
    for nfe in tqdm(BUDGETS, desc="budgets"):
        rows += rows_of(bench, nfe)
    with (ROOT / "benchmarks/results/sit.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerows([Row._fields, *rows])
    draw(rows, images)
    print_markdown(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="how many images to report on (default 256)")
    main(parser.parse_args().images)
