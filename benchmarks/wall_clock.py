"""What is left of the saving on the clock: E = (1 - T / T_0) / (1 - NFE / N), of the loop alone and end to end.

    python -m benchmarks.wall_clock [--cases wan] [--samples 2 8] [--repeats 9]

T_0 is the time of the bare sampler with its N evaluations, T that of the cached one with NFE; E = 1 would be a cache
that costs nothing. The loop is the integration; end to end also loads the profile, plans and decodes. Bare and cached
runs take turns, so that a machine that grows slower is slow for both, and the medians of `repeats` are taken after a
run that is not counted. The share outside of the field is what the cached loop spends between evaluations. On CPU
glibc is told to keep what is freed, for all runs (`keep_memory`), as PyTorch does on a GPU.
Writes results/wall_clock.csv and the table in docs/comparison.md.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import STEPS, Case, cases
from benchmarks.results import environment
from benchmarks.written import ROOT, TITLES, publish
from sencache import CachedField
from solvers import integrate

BUDGETS = (25, 20, 15, 10)
FILE = Path(__file__).parent / "results/wall_clock.csv"
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of malloc.h


class Clocked(NamedTuple):
    """One line of the table; seconds are of the whole batch."""

    field: str
    hardware: str
    samples: int
    evaluation_ms: float
    nfe: int
    seconds_full: float
    seconds: float
    outside: float
    efficiency: float
    efficiency_end_to_end: float


class Timed:
    """A field that adds up the time spent in it."""

    def __init__(self, field: Any):
        self.field, self.seconds = field, 0.0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        start = now()
        y = self.field(x, t)
        self.seconds += now() - start
        return y


def keep_memory() -> None:
    """Have glibc keep what is freed. Else activations go back to the system and are fetched again, page by page.

    What of them goes back depends on which small tensor happens to lie at the heap's end, so that evaluations of one
    field take up to 6 % longer in one loop than in another, and 15 % longer in both. Does nothing where there is no
    glibc. MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ in the environment do the same.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for option, size in ((MMAP_THRESHOLD, 32 << 20), (TRIM_THRESHOLD, 1 << 30)):  # bytes; the first is its maximum
        if mallopt:
            mallopt(option, size)


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(run: Callable[[], Any]) -> float:
    start = now()
    run()
    return now() - start


def clock(case: Case, count: int, repeats: int) -> list[Clocked]:
    """The table of one case."""
    field, x, _ = case.samples(count, "reported")
    grid, timed = case.grid(), Timed(field)
    hardware = environment()["gpus"] or [environment()["cpu"]]

    def bare() -> Tensor:
        return integrate(field, x, grid, case.stepper)

    def whole(nfe: int) -> Tensor:
        return case.pixels(CachedField(field, case.profile, nfe=nfe).integrate(x, grid, case.stepper))

    rows = []
    for nfe in BUDGETS:
        ours, watched = (CachedField(each, case.profile, nfe=nfe) for each in (field, timed))
        ours.plan(grid, case.stepper)  # planned once, and then known
        watched.plan(grid, case.stepper)
        runs: dict[str, Callable[[], Any]] = {
            "bare": bare,
            "ours": lambda ours=ours: ours.integrate(x, grid, case.stepper),  # type: ignore[misc]
            "bare whole": lambda: case.pixels(bare()),
            "ours whole": lambda nfe=nfe: whole(nfe),  # type: ignore[misc]
        }
        for run in runs.values():
            run()
        taken: dict[str, list[float]] = {name: [] for name in (*runs, "outside")}
        for _ in range(repeats):
            for name, run in runs.items():
                taken[name].append(seconds(run))
            timed.seconds = 0.0
            spent = seconds(lambda watched=watched: watched.integrate(x, grid, case.stepper))  # type: ignore[misc]
            taken["outside"].append(1 - timed.seconds / spent)
        t = {name: median(times) for name, times in taken.items()}
        saved = 1 - nfe / STEPS
        efficiency = (1 - t["ours"] / t["bare"]) / saved
        overall = (1 - t["ours whole"] / t["bare whole"]) / saved
        times = t["bare"], t["ours"], t["outside"], efficiency, overall
        rows.append(Clocked(case.name, hardware[0], count, 1000 * t["bare"] / STEPS, nfe, *times))
    return rows


def main(names: list[str], counts: list[int], repeats: int) -> None:
    torch.set_grad_enabled(False)
    keep_memory()
    rows = [row for name in names for count in counts for row in clock(cases()[name], count, repeats)]
    with FILE.open("w", newline="") as file:
        csv.writer(file).writerows([Clocked._fields, *rows])
    table = [
        {
            "field": TITLES[row.field],
            "samples": str(row.samples),
            "one evaluation, ms": f"{row.evaluation_ms:.0f}",
            "NFE": str(row.nfe),
            "all 50, s": f"{row.seconds_full:.2f}",
            "ours, s": f"{row.seconds:.2f}",
            "outside of the field": f"{row.outside:.1%}",
            "E, loop": f"{row.efficiency:.3f}",
            "E, end to end": f"{row.efficiency_end_to_end:.3f}",
        }
        for row in rows
    ]
    publish("wall_clock", {rows[0].hardware: table}, ROOT / "docs/comparison.md")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(cases()), default=["wan"], help="by default wan")
    parser.add_argument("--samples", nargs="+", type=int, default=[2, 8], help="in one batch (default 2, and then 8)")
    parser.add_argument("--repeats", type=int, default=9, help="of which the median is taken (default 9)")
    options = parser.parse_args()
    main(options.cases, options.samples, options.repeats)
