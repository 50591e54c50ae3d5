"""Where the default could collapse: other grids, guidances, lengths, precisions, paths and steppers.

    python -m benchmarks.sweep [--images 32]

Every setting is calibrated anew on 8 samples of the calibration seeds. Writes benchmarks/results/sweep.csv and prints
it as Markdown: PSNR to the same sampler with all its evaluations, of ours, of ours without calibration (a profile
assumed; and own differences, under a tolerance that spends as much on 8 samples of the choosing
seeds) and of the same stepper with fewer steps of the same kind of grid, at a half, a third and a fifth of the
evaluations. A quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator
from pathlib import Path as File
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.fields.gmm import GaussianMixture
from benchmarks.metrics import psnr
from benchmarks.shipped import DEVICE, FIELDS, SEEDS, noise, sit_field
from benchmarks.spending import tolerance_that_spends
from sencache import CachedField, assumed, calibrate
from solvers import VP, DPMSolverPP, Euler, Heun, Linear, Path, Stepper, UniPC, grids, integrate

Grid = Callable[[int], Tensor]
UNIFORM: Grid = grids.uniform


class Setting(NamedTuple):
    """A field for B samples, its initial states for a purpose, a grid for K steps, a stepper."""

    name: str
    field: Callable[[int], Any]
    start: Callable[[int, str], Tensor]
    grid: Grid
    steps: int = 50
    stepper: Stepper = Euler()
    path: Path = Linear()
    together: bool | None = None  # whether samples that go by their own differences decide together


class Half:
    """A field whose states are bfloat16, and whose network computes as it always does."""

    def __init__(self, field: Any):
        self.field = field

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.field(x.float(), t).to(x.dtype)

    def select(self, rows: Tensor) -> Half:
        return Half(self.field.select(rows))


class Whole:
    """A field that is only ever evaluated for all of its samples."""

    def __init__(self, field: Any):
        self.field = field

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.field(x, t)


def sit(name: str, grid: Grid = UNIFORM, steps: int = 50, stepper: Stepper = Euler(), guidance: float = 2.0) -> Setting:  # noqa: B008
    return Setting(f"SiT, {name}", lambda samples: sit_field(samples, guidance), noise, grid, steps, stepper)


def gmm_noise(samples: int, purpose: str) -> Tensor:
    generator = torch.Generator().manual_seed(SEEDS[purpose])
    return torch.randn(samples, 1, 16, 16, generator=generator).to(DEVICE)


def gmm(name: str, path: Path, grid: Grid, stepper: Stepper = Euler()) -> Setting:  # noqa: B008
    field = GaussianMixture.load(FIELDS / "gmm.safetensors", path).to(DEVICE)
    return Setting(f"mixture, {name}", lambda samples: field, gmm_noise, grid, 50, stepper, path)


def settings() -> Iterator[Setting]:
    yield sit("as shipped")
    for guidance in (1.0, 4.0, 7.0):
        yield sit(f"guidance {guidance:g}", guidance=guidance)
    for shift in (3.0, 5.0):
        yield sit(f"shift {shift:g}", lambda steps, shift=shift: grids.shifted(steps, shift))  # type: ignore[misc]
    for steps in (25, 100):
        yield sit(f"{steps} steps", steps=steps)
    yield Setting("SiT, bfloat16 states", lambda n: Half(sit_field(n)), lambda n, p: noise(n, p).bfloat16(), UNIFORM)
    whole = Setting("SiT, without `select`", lambda n: Whole(sit_field(n)), noise, UNIFORM)
    yield from (whole, whole._replace(name="SiT, without it, apart", together=False))
    for stepper in (Heun(), DPMSolverPP(Linear()), UniPC(Linear())):
        yield sit(type(stepper).__name__, stepper=stepper, steps=25 if isinstance(stepper, Heun) else 50)
    yield gmm("linear path", Linear(), UNIFORM)
    yield gmm("VP path, uniform grid", VP(), lambda steps: grids.uniform(steps, 1.0, 1e-3))
    yield gmm("VP path, logarithmic grid", VP(), lambda steps: grids.logarithmic(steps, 1.0, 1e-3))
    yield gmm("VP path, logarithmic, UniPC", VP(), lambda steps: grids.logarithmic(steps, 1.0, 1e-3), UniPC(VP()))


def tolerance_for(setting: Setting, nfe: int, samples: int = 8) -> float:
    """The tolerance under which own differences spend `nfe` evaluations, the mean of samples of the choosing seeds."""
    field, x, ts = setting.field(samples), setting.start(samples, "choosing"), setting.grid(setting.steps)

    def spent(tolerance: float) -> float:
        cached = CachedField(field, tolerance=tolerance, together=setting.together)
        cached.integrate(x, ts, setting.stepper)
        return float(cached.report.evaluations.double().mean())

    return tolerance_that_spends(nfe, spent, low=-9.0)


def measure(setting: Setting, images: int) -> Iterator[dict[str, Any]]:
    ts, stepper = setting.grid(setting.steps), setting.stepper
    profile = calibrate(setting.field(8), setting.start(8, "calibration"), ts, stepper, progress=False)
    field, x = setting.field(images), setting.start(images, "reported")
    full = integrate(field, x, ts, stepper)
    stages = 2 if isinstance(stepper, Heun) else 1
    for share in (2, 3, 5):
        nfe = stages * setting.steps // share
        ours = psnr(CachedField(field, profile, nfe=nfe).integrate(x, ts, stepper), full)
        without = psnr(CachedField(field, assumed(setting.path, ts), nfe=nfe).integrate(x, ts, stepper), full)
        own = CachedField(field, tolerance=tolerance_for(setting, nfe), together=setting.together)
        differences = psnr(own.integrate(x, ts, stepper), full)
        fewer = psnr(integrate(field, x, setting.grid(nfe // stages), stepper), full)
        yield {
            "setting": setting.name,
            "nfe": nfe,
            "of": stages * setting.steps,
            "ours": round(float(ours.median()), 1),
            "ours_p10": round(float(ours.quantile(0.1)), 1),
            "assumed": round(float(without.median()), 1),
            "assumed_p10": round(float(without.quantile(0.1)), 1),
            "differences": round(float(differences.median()), 1),
            "differences_p10": round(float(differences.quantile(0.1)), 1),
            "differences_nfe": round(float(own.report.evaluations.double().mean()), 1),
            "fewer_steps": round(float(fewer.median()), 1),
            "fewer_steps_p10": round(float(fewer.quantile(0.1)), 1),
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="how many samples a setting is reported on (default 32)")
    images = parser.parse_args().images
    torch.set_grad_enabled(False)
    rows = [row for setting in tqdm(list(settings())) for row in measure(setting, images)]
    with (File(__file__).parent / "results/sweep.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    named = [f"{way}: median | worst decile" for way in ("ours", "assumed", "own differences", "fewer steps")]
    named.insert(3, "of evaluations")
    print(f"| setting | NFE | {' | '.join(named)} |\n" + "|---" * 11 + "|")
    for row in rows:
        print(
            f"| {row['setting']} | {row['nfe']} of {row['of']} | "
            + " | ".join(str(v) for v in list(row.values())[3:])
            + " |"
        )
