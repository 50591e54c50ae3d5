"""Measure a field or a pipeline once, and write its profile to a file.

    sencache calibrate --field benchmarks.shipped:sit_field --shape 1x32x32 --out sit.safetensors
    sencache calibrate --pipeline FOLDER --prompt "a cat on a wall" --steps 50 --out wan.safetensors

An interrupted measurement of a field goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from glob import escape
from pathlib import Path

from sencache.command.options import add_source, check_target, count, open_source
from sencache.command.pipelines import PipelineSource
from sencache.command.source import seeds_in_words
from solvers import Heun

ENOUGH = 22  # rehearsed samples, from which what is promised holds in nine of ten rehearsals


def add_options(parser: argparse.ArgumentParser) -> None:
    add_source(parser, seed=0)
    parser.add_argument("--out", required=True, metavar="FILE", help="the profile, a safetensors file")
    parser.add_argument("--overwrite", action="store_true", help="also where that file exists")
    parser.add_argument(
        "--rehearse", type=count, metavar="N", help="try plans on N further samples: errors are promised"
    )
    parser.add_argument(
        "--no-secants", action="store_true", help="of a field measure what plans need alone, at a third of the cost"
    )


def run(options: argparse.Namespace) -> None:
    """Measure, write, and say what to type next."""
    check_target(options.out, options.overwrite)
    source = open_source(options)
    if options.rehearse and isinstance(getattr(source, "stepper", None), Heun):
        raise ValueError(
            "--rehearse goes with steppers of one evaluation a step: leave it out, or take another stepper."
        )
    samples = options.samples or source.few
    seeds = range(options.seed, options.seed + samples)
    unfinished = Path(f"{options.out}.unfinished")
    try:
        profile = source.measured(seeds, not options.no_secants, str(unfinished))
        if options.rehearse:
            fresh = range(seeds.stop, seeds.stop + options.rehearse)
            profile = source.rehearsed(profile, fresh)
            seeds = range(seeds.start, fresh.stop)
    except KeyboardInterrupt:
        begun = any(unfinished.parent.glob(f"{escape(unfinished.name)}*"))
        kept = f"What was measured is in {unfinished}; the same command goes on from there." if begun else ""
        raise KeyboardInterrupt(kept or "Nothing was written.") from None
    profile = replace(profile, facts={**profile.facts, "seeds": [seeds[0], seeds[-1]]})
    profile.save(options.out)
    unfinished.unlink(missing_ok=True)
    runs = f"{samples} full run{'s' * (samples > 1)} of {source.steps} steps"
    print(f"{options.out}: {runs} ({source.method}), {seeds_in_words(seeds[:samples])}.")
    if options.rehearse:
        print(f"Plans were rehearsed on {options.rehearse} further samples, {seeds_in_words(seeds[samples:])}.")
    if profile.factors is not None and (tried := profile.factors.shape[1]) < ENOUGH:
        kept = f"What is promised is what {tried} of them kept; with {ENOUGH} or more it holds of 90 % of samples"
        print(f"{kept} in nine of ten rehearsals.")
    print(f"Next: sencache show {shlex.quote(options.out)}")
    print(f"      sencache compare {again(options)} --profile {shlex.quote(options.out)}")
    if isinstance(source, PipelineSource):
        print(
            f'Python: sencache.enable(pipe, sencache.SensitivityProfile.load("{options.out}"), nfe={source.steps // 2})'
        )


def again(options: argparse.Namespace) -> str:
    """The options that name the same source to `compare`; a profile tells the rest of a field."""
    if options.field:
        names = ["field", "device", "dtype"]
    else:
        names = ["pipeline", "prompt", "prompts", "negative_prompt", "steps", "guidance", "height", "width", "frames"]
        names += ["option", "device", "dtype"]
    words = []
    for name in names:
        value = getattr(options, name)
        for one in value if isinstance(value, list) else [value]:
            words += [] if one is None else [f"--{name.replace('_', '-')}", shlex.quote(str(one))]
    return " ".join(words)
