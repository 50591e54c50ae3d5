"""What plans gain from counting echoes and from being polished, and what wrong states do (docs/theory.md, Plans).

    python -m benchmarks.echoes [--samples 64]

Of every field, for 25, 20, 15 and 10 evaluations: the relative error that was made over the one that was expected, and
PSNR to the full run, medians; from a profile without sensitivities, whose plans know of no echo, from one with them
whose plans are shortest paths and no more, and from that one as it is. Calibrated on 8 samples of the calibration
seeds; numbers of the reported ones, a quarter as many of videos.
Then what a debt really does to the output evaluated in the state that owes it, at the evaluations of plans of 20, for
fields sampled by Euler: its size over ||J_x|| |debt|, and the cosine between both. That takes two more evaluations at
each. Prints the tables as Markdown. Shapes: B samples.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.cases import cases
from benchmarks.metrics import psnr
from benchmarks.shipped import SEEDS
from benchmarks.sweep import settings
from sencache import CachedField, SensitivityProfile, calibrate
from sencache.expected import Errors
from sencache.norms import rms
from solvers import Euler, Stepper, grids, integrate

BUDGETS = (25, 20, 15, 10)


class Looked(NamedTuple):
    """A field, its profile and sampler, and the initial states (S, ...) that are reported on."""

    name: str
    field: Any
    x: Tensor
    ts: Tensor
    stepper: Stepper
    profile: SensitivityProfile
    pixels: Callable[[Tensor], Tensor] = lambda x: x


def states(samples: int, purpose: str) -> Tensor:
    """Initial states (samples, 1, 4, 4), float64, of the fields that have a formula."""
    generator = torch.Generator().manual_seed(SEEDS[purpose])
    return torch.randn(samples, 1, 4, 4, generator=generator, dtype=torch.float64)


def fields(samples: int) -> Iterator[Looked]:
    """Three with a formula, the mixture, and those that ship."""
    formulas: dict[str, Any] = {
        "v = -x": lambda x, t: -x,
        "v = sin(2 x + 3 t) - x": lambda x, t: torch.sin(2 * x + 3 * t) - x,
        "v = -x / (0.1 + t)": lambda x, t: -x / (0.1 + t),
    }
    for name, field in formulas.items():
        ts, x = grids.uniform(60), states(samples, "reported")
        profile = calibrate(field, states(8, "calibration"), ts, progress=False)
        yield Looked(f"{name}, 60 steps", field, x, ts, Euler(), profile)
    for setting in settings():
        if setting.name.startswith("mixture"):
            ts, stepper = setting.grid(setting.steps), setting.stepper
            start = setting.start(8, "calibration")
            profile = calibrate(setting.field(8), start, ts, stepper, progress=False)
            x = setting.start(samples, "reported")
            yield Looked(setting.name, setting.field(samples), x, ts, stepper, profile)
    for name, case in cases().items():
        field, x, _ = case.samples(samples if name == "sit" else -(-samples // 4), "reported")
        yield Looked(name, field, x, case.grid(), case.stepper, case.profile, case.pixels)


def measured(looked: Looked) -> Iterator[tuple[float, float]]:
    """Made over expected error and PSNR, medians, at every budget: without echoes, not polished, and as it is."""
    _, field, x, ts, stepper, profile, pixels = looked
    full = integrate(field, x, ts, stepper)
    silent = replace(profile, alpha_x=0 * profile.alpha_x, samples_x=None)
    as_it_is, as_found = Errors.polished, lambda self, nodes: nodes
    for known, polished in ((silent, as_it_is), (profile, as_found), (profile, as_it_is)):
        for nfe in BUDGETS:
            cached = CachedField(field, known, nfe=nfe)
            with patch.object(Errors, "polished", polished):
                end = cached.integrate(x, ts, stepper)
            made = (rms(end - full) / rms(full)).median()
            expected = cached.plan(ts, stepper).relative_error
            yield float(made) / expected, float(psnr(pixels(end), pixels(full)).median())


def angles(looked: Looked, nfe: int = 20) -> tuple[Tensor, Tensor]:
    """Of the N repaid debts of a plan: size of the echo over ||J_x|| |debt|, and cosine to the debt, (N, B) each."""
    _, field, x, ts, stepper, profile, _ = looked
    cached, found = CachedField(field, profile, nfe=nfe), []
    alpha_x = profile.lookup(ts[:-1].double())[0]
    with cached.following(ts, stepper) as (run, repaying):
        memory = None
        for k, (t, t_next) in enumerate(pairwise(ts)):
            outputs: list[Tensor] = []

            def kept(x: Tensor, t: Tensor, outputs: list[Tensor] = outputs) -> Tensor:
                outputs.append(run(x, t))
                return outputs[0]

            dx, memory = repaying.advance(kept, x, t, t_next, memory)
            debt = dx - (t_next - t) * outputs[0]
            if debt.any():
                echo = field(x + debt, t) - field(x, t)
                aligned = (echo * debt).flatten(1).mean(1) / (rms(echo) * rms(debt))
                found.append((rms(echo) / rms(debt) / alpha_x[k], aligned))
            x = x + dx
    sizes, cosines = zip(*found, strict=True)
    return torch.stack(sizes), torch.stack(cosines)


def thirds(values: Tensor) -> str:
    """Medians of (N, B) in the first, middle and last third of N."""
    return " / ".join(f"{part.median():.2f}" for part in values.tensor_split(3))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64, help="how many to report on (default 64)")
    samples = parser.parse_args().samples
    torch.set_grad_enabled(False)
    ways = ("without echoes", "not polished", "ours")
    print(
        f"| {' / '.join(map(str, BUDGETS))} | made / expected: "
        + " | ".join(ways)
        + " | PSNR: "
        + " | ".join(ways)
        + " |"
    )
    print("|---" * 7 + "|")
    for looked in fields(samples):
        ratios, quality = zip(*measured(looked), strict=True)
        parts = (slice(4), slice(4, 8), slice(8, 12))
        cells = [
            " / ".join(f"{value:.0f}" if value >= 10 else f"{value:.1f}" for value in ratios[part]) for part in parts
        ]
        cells += [" / ".join(f"{value:.1f}" for value in quality[part]) for part in parts]
        print(f"| {looked.name} | {' | '.join(cells)} |", flush=True)
    print("\n| first / middle / last third of 20 evaluations | size over the one counted | cosine to the debt |")
    print("|---|---|---|")
    for looked in fields(samples):
        if looked.stepper == Euler():
            sizes, cosines = angles(looked)
            print(f"| {looked.name} | {thirds(sizes)} | {thirds(cosines)} |", flush=True)
