"""Sample in full, with sencache, and with fewer steps; a table, and a picture of the samples side by side.

    sencache compare --field benchmarks.shipped:sit_field --profile sit.safetensors --nfe 20 10
    sencache compare --pipeline FOLDER --prompt "a cat on a wall" --steps 50 --nfe 20

Without --profile it is measured first, on other seeds, and kept nowhere.
"""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple

import torch
from torch import Tensor

from sencache.command.options import add_source, check_nfe, check_pictures, count, load_profile, open_source
from sencache.command.source import Outcome, Source, seeds_in_words
from sencache.norms import rms
from sencache.profile import SensitivityProfile

MEASURED = -1000  # where the seeds of a profile begin that is measured here
PICTURES = 8  # samples that are shown


class Row(NamedTuple):
    """One line of the table."""

    name: str
    outcome: Outcome


def add_options(parser: argparse.ArgumentParser) -> None:
    add_source(parser, seed=1000)
    parser.add_argument("--profile", metavar="FILE", help="what `sencache calibrate` wrote")
    parser.add_argument("--nfe", type=count, nargs="+", metavar="N", help="budgets (default 1/2 and 1/4 of the steps)")
    parser.add_argument("--picture", default="comparison.png", metavar="FILE", help="default comparison.png")
    parser.add_argument("--no-picture", action="store_true", help="print the table alone")


def run(options: argparse.Namespace) -> None:
    """Sample, print, draw."""
    if not options.no_picture:
        check_pictures(options.picture)
    profile = load_profile(options.profile) if options.profile else None
    source = open_source(options, profile)
    budgets = options.nfe or sorted({-(-source.steps // 2), -(-source.steps // 4)}, reverse=True)
    check_nfe(budgets, source.steps)
    samples = options.samples or source.few
    seeds = range(options.seed, options.seed + samples)
    if profile is None:
        own = range(options.seed + MEASURED, options.seed + MEASURED + source.few)
        profile = source.measured(own, False, None)
        print(f"Measured on {seeds_in_words(own)}; `sencache calibrate` keeps what is measured.")
    source.check(profile, budgets)
    rows = [Row(f"full, {source.steps} steps", source.full(seeds))]
    for nfe in budgets:
        rows.append(Row(f"sencache, nfe={nfe}", source.cached(seeds, profile, nfe)))
        steps, outcome = source.fewer(seeds, nfe)
        rows.append(Row(f"fewer steps, {steps}", outcome))
    taken = f"{samples} sample{'s' * (samples > 1)}, {seeds_in_words(seeds)}"
    print(f"{taken}; {source.method}, {source.steps} steps.{overlap(profile, seeds)}")
    print(table(rows, source))
    if not options.no_picture:
        draw(rows, source, options.picture)


def overlap(profile: SensitivityProfile, seeds: range) -> str:
    """A word about seeds that the profile has seen."""
    first, last = profile.facts.get("seeds", (0, -1))
    shared = range(max(first, seeds.start), min(last + 1, seeds.stop))
    return f" The profile was made from {seeds_in_words(shared)} too: take others with --seed." if shared else ""


def table(rows: list[Row], source: Source) -> str:
    """Errors to the full run: relative RMS, and in dB where samples are pictures."""
    full = rows[0].outcome
    wide = len(source.counted) + 2
    heads = f"{'':<22}{source.counted:>{wide}}{'seconds':>9}{'speed-up':>10}"
    heads += f"{'error: median':>15}{'worst decile':>14}{'expected':>10}"
    lines = [heads + (f"{'PSNR: median':>14}{'worst decile':>14}" if source.span else "")]
    for name, outcome in rows:
        line = f"{name:<22}{outcome.evaluations:{wide}.4g}{outcome.seconds:9.3g}{full.seconds / outcome.seconds:9.2f}x"
        if outcome is not full:
            error = relative_error(outcome.samples, full.samples)
            expected = "" if math.isnan(outcome.expected) else f"{outcome.expected:.2e}"
            line += f"{error.median():15.2e}{error.quantile(0.9):14.2e}{expected:>10}"
            if source.span:
                near = psnr(outcome.samples, full.samples, source.span)
                line += f"{near.median():11.1f} dB{near.quantile(0.1, interpolation='lower'):11.1f} dB"
        lines.append(line)
    lines.append(
        "Counts and seconds, planning included, are a sample's. Errors are RMS, relative to the full run of its"
    )
    lines.append("seed; what is expected is said by the profile beforehand, of the final state undecoded.")
    return "\n".join(line.rstrip() for line in lines)


def relative_error(samples: Tensor, full: Tensor) -> Tensor:
    """RMS error over the RMS of the full run's sample, (B,) float64."""
    return rms(samples.double() - full.double()) / rms(full.double())


def psnr(samples: Tensor, full: Tensor, span: float) -> Tensor:
    """Peak signal-to-noise ratio in dB of data that span `span`, (B,) float64."""
    return 20 * torch.log10(span / rms(samples.double() - full.double()))


def draw(rows: list[Row], source: Source, path: str) -> None:
    """The samples side by side, a row a way of sampling."""
    from sencache.plots import draw_samples, saved

    full = rows[0].outcome.samples[:PICTURES]
    shown = {}
    for name, outcome in rows:
        label = f"{name}\n{outcome.evaluations:.4g} {source.counted}"
        if outcome.samples is not rows[0].outcome.samples:
            label += f"\nerror {relative_error(outcome.samples, rows[0].outcome.samples).median():.1e}"
        shown[label] = [
            source.picture(one, whole) for one, whole in zip(outcome.samples[:PICTURES], full, strict=False)
        ]
    with saved(path) as figure:
        draw_samples(figure, shown)
    print(f"{path}: {len(full)} of the samples side by side.")
