"""A field named on the command line, sampled by a stepper of ours. Shapes: x (B, ...); ts (K + 1,)."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sencache.cache import CachedField
from sencache.calibrate import calibrate
from sencache.command.named import field_maker
from sencache.command.source import Outcome, plain_picture
from sencache.profile import SensitivityProfile
from sencache.rehearse import rehearse
from solvers import VP, Cosine, DPMSolverPP, Euler, Heun, Linear, Path, Stepper, UniPC, grids, integrate

STEPPERS: dict[str, Callable[[Path], Stepper]] = {
    "euler": lambda path: Euler(),
    "heun": lambda path: Heun(),
    "dpm++": DPMSolverPP,
    "unipc": UniPC,
}


class Watched:
    """A field that counts the samples it is asked for, on a progress bar."""

    def __init__(self, field: Any, bar: Any):
        self.field, self.bar = field, bar

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        v = self.field(x, t)
        self.bar.update(len(x))
        return v

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.field, name)
        return (lambda rows: Watched(value(rows), self.bar)) if name == "select" else value


class FieldSource:
    """A field `MODULE:NAME` on a grid, from noise of given seeds.

    What the options leave open is as `profile` was measured: the shape, the grid and the stepper.
    """

    few, counted = 8, "evaluations"

    def __init__(self, options: argparse.Namespace, profile: SensitivityProfile | None):
        facts = {} if profile is None else profile.facts
        self.make = field_maker(options.field)
        self.shape = options.shape or tuple(facts.get("shape") or ())
        if not self.shape:
            raise ValueError("--field needs the --shape of one sample, such as --shape 1x32x32.")
        self.device = device(options.device)
        self.dtype = getattr(torch, options.dtype or "float32")
        self.ts = grid(options, profile)
        self.steps = len(self.ts) - 1
        field = self._try(options.field)
        own = getattr(field, "path", None)
        path = own if isinstance(own, Path) else Linear(data_at=float(self.ts[-1] > self.ts[0]))
        self.stepper = STEPPERS[options.stepper or "euler"](path)
        if options.stepper is None and profile is not None:
            self.stepper = stepper_of(profile)
        self.method = next(name for name, kind in STEPPERS.items() if isinstance(self.stepper, type(kind(path))))
        is_picture = len(self.shape) == 3 and self.shape[0] in (1, 3)
        self.span = 2.0 if is_picture else None  # pictures are in [-1, 1]

    def noise(self, seeds: range) -> Tensor:
        """x_T (B, ...), a generator a sample, so that a seed gives the same sample in every batch."""
        each = [torch.randn(self.shape, generator=torch.Generator().manual_seed(seed), device="cpu") for seed in seeds]
        return torch.stack(each).to(self.device, self.dtype)

    def measured(self, seeds: range, secants: bool, file: str | None) -> SensitivityProfile:
        field, x = self.make(len(seeds)), self.noise(seeds)
        shown = sys.stderr.isatty()
        return calibrate(field, x, self.ts, self.stepper, secants=secants, file=file, progress=shown)

    def rehearsed(self, profile: SensitivityProfile, seeds: range) -> SensitivityProfile:
        x, shown = self.noise(seeds), sys.stderr.isatty()
        return rehearse(self.make(len(x)), profile, x, self.ts, self.stepper, progress=shown)

    def check(self, profile: SensitivityProfile, budgets: list[int]) -> None:
        for nfe in budgets:
            CachedField(self.make(1), profile, nfe=nfe).plan(self.ts, self.stepper)

    def full(self, seeds: range) -> Outcome:
        return self._timed("full", seeds, lambda field, x: integrate(field, x, self.ts, self.stepper))

    def cached(self, seeds: range, profile: SensitivityProfile, nfe: int) -> Outcome:
        ours = CachedField(self.make(len(seeds)), profile, nfe=nfe)

        def sample(field: Any, x: Tensor) -> Tensor:
            ours.field = field
            return ours.integrate(x, self.ts, self.stepper)

        outcome = self._timed(f"nfe={nfe}", seeds, sample)
        return outcome._replace(expected=ours.plan(self.ts, self.stepper).relative_error)

    def fewer(self, seeds: range, nfe: int) -> tuple[int, Outcome]:
        steps = max(1, nfe // 2) if isinstance(self.stepper, Heun) else nfe
        at = np.linspace(0, self.steps, steps + 1)  # the same grid's spacing
        ts = torch.from_numpy(np.interp(at, np.arange(self.steps + 1), self.ts.numpy()))
        return steps, self._timed(f"{steps} steps", seeds, lambda field, x: integrate(field, x, ts, self.stepper))

    def picture(self, sample: Tensor, full: Tensor) -> Any:
        if self.span is None:
            return plain_picture(sample, full)
        return ((sample.float() + 1) / 2).clamp(0, 1).permute(1, 2, 0).squeeze(2).numpy()

    def _try(self, name: str) -> Any:
        """The field, once it has been evaluated at the first time."""
        try:
            field = self.make(1)
            v = field(self.noise(range(1)), self.ts[0])
        except Exception as error:  # whatever somebody's field raises
            raise ValueError(
                f"{name} could not be evaluated on x of shape {(1, *self.shape)} at t = {self.ts[0]:g} on "
                f"{self.device}: {type(error).__name__}: {error}. See --shape, --start, --device and --dtype."
            ) from error
        if not isinstance(v, Tensor) or v.shape[1:] != self.shape:
            came = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(f"{name} should return v like x, {(1, *self.shape)}; got {came}. See --shape.")
        return field

    def _timed(self, name: str, seeds: range, sample: Callable[[Any, Tensor], Tensor]) -> Outcome:
        field, x = self.make(len(seeds)), self.noise(seeds)
        counter = Counter()
        with progress(name) as bar:
            counter.bar = bar
            self._wait()
            begin = time.perf_counter()
            end = sample(Watched(field, counter), x)
            self._wait()
            spent = time.perf_counter() - begin
        return Outcome(end.cpu(), counter.rows / len(x), spent / len(x))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Counter:
    """Rows that were evaluated, also where no bar is shown."""

    bar: Any

    def __init__(self) -> None:
        self.rows = 0

    def update(self, rows: int) -> None:
        """So many more."""
        self.rows += rows
        self.bar.update(rows)


def progress(name: str) -> tqdm:
    """A count on a terminal, and nothing elsewhere."""
    return tqdm(desc=f"{name:<12}", unit=" eval", leave=False, disable=None)


def grid(options: argparse.Namespace, profile: SensitivityProfile | None) -> Tensor:
    """The grid that the options say, or the calibrated one where they say nothing."""
    said = (options.steps, options.start, options.end, options.shift)
    if profile is not None and said == (None,) * 4:
        return profile.grid
    start, end = (1.0 if options.start is None else options.start), (0.0 if options.end is None else options.end)
    return grids.shifted(options.steps or 50, 1.0 if options.shift is None else options.shift, start, end)


def device(name: str | None) -> torch.device:
    """The device of that name, where there is one."""
    try:
        found = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=found)
    except Exception as error:  # torch raises AssertionError, RuntimeError or others, by the device
        raise ValueError(f"--device {name} cannot be used here: {error}") from error
    return found


def stepper_of(profile: SensitivityProfile) -> Stepper:
    """The stepper that a profile was measured with, or Euler where it is none of ours."""
    name = profile.facts.get("stepper")
    for kind, path, data_at in product(STEPPERS.values(), (Linear, Cosine, VP), (0.0, 1.0)):
        if str(kind(path(data_at))) == name:
            return kind(path(data_at))
    return Euler()
