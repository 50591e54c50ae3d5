"""The shipped SiT with its outputs reused and with its block stack reused, at equal evaluations.

    python -m benchmarks.payloads [--images 64] [--seeds reported]

PSNR to the same sampler with all 50 evaluations, median and worst decile, as Markdown. Schedules are the profile's
plan, which is made for reused outputs, and one spread evenly over the grid, which favours neither. Below each pair is
the mean of the differences image by image, with its standard error.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.metrics import psnr
from benchmarks.shipped import GRID, SEEDS, STEPS, noise, sit_field, sit_profile
from sencache import CachedField
from sencache.adapters.sit import SiTField
from solvers import integrate

BATCH = 8
BUDGETS = (25, 20, 15, 10)
REUSES: dict[str, dict[str, Any]] = {
    "hold": {"reuse": "hold"},
    "linear": {"reuse": "linear", "correct": False},
    "linear + correction": {"reuse": "linear"},
}


def evenly(nfe: int) -> Callable[[float], float]:
    """A tolerance that evaluates `nfe` times, at equal intervals of the grid, and reuses everything else."""
    at = GRID[torch.linspace(0, STEPS, nfe + 1)[:-1].round().long()]
    return lambda t: 0.0 if (at - t).abs().min() < 1e-9 else math.inf


def head_cost(field: SiTField, x: Tensor) -> float:
    """The time of embeddings and head over that of an evaluation, on a batch x (B, ...): medians of 20."""
    spent: dict[str, list[float]] = {"head": [], "all": []}
    stack = field.stack(x, 0.5)
    for _ in range(20):
        for name, call in (("head", lambda: field.head(x, 0.5, stack)), ("all", lambda: field(x, 0.5))):
            start = time.perf_counter()
            call()
            spent[name].append(time.perf_counter() - start)
    return statistics.median(spent["head"]) / statistics.median(spent["all"])


def main(images: int, seeds: str) -> None:
    torch.set_grad_enabled(False)
    field, x, profile = sit_field(images), noise(images, seeds), sit_profile()
    batches = torch.arange(images).split(BATCH)
    full = torch.cat([integrate(field.select(rows), x[rows], GRID) for rows in batches])
    print(f"Embeddings and head take {head_cost(field.select(batches[0]), x[:BATCH]):.1%} of an evaluation.\n")
    print("| schedule | reuse | payload | " + " | ".join(f"{nfe}" for nfe in BUDGETS) + " |")
    print("|---" * (len(BUDGETS) + 3) + "|")
    for schedule in ("plan", "even"):
        for name, options in REUSES.items():
            near: dict[str, list[Tensor]] = {}
            for payload in ("output", "blocks"):
                near[payload] = []
                for nfe in BUDGETS:
                    how: dict[str, Any] = {"nfe": nfe}
                    if schedule == "even":
                        how = {"tolerance": evenly(nfe), "max_reuses": math.inf}
                    ends = []
                    for rows in batches:
                        cached = CachedField(field.select(rows), profile, payload=payload, **options, **how)
                        ends.append(cached.integrate(x[rows], GRID))
                        assert (cached.report.evaluations == nfe).all()
                    near[payload].append(psnr(torch.cat(ends), full))
                cells = [f"{one.median():.1f} / {one.quantile(0.1):.1f}" for one in near[payload]]
                print(f"| {schedule} | {name} | {payload} | " + " | ".join(cells) + " |", flush=True)
            gains = [blocks - output for blocks, output in zip(near["blocks"], near["output"], strict=True)]
            cells = [f"{gain.mean():+.1f} ± {gain.std() / math.sqrt(images):.1f}" for gain in gains]
            print("| | | blocks - output | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="how many images (default 64)")
    parser.add_argument(
        "--seeds", choices=list(SEEDS), default="reported", help="which set of seeds (default reported)"
    )
    options = parser.parse_args()
    main(options.images, options.seeds)
