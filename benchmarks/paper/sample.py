"""Sample the prompts of a file with every method, on one GPU or many; what is there already is not done again.

    python -m benchmarks.paper.sample --model wan --weights DIR --prompts FILE --out OUT
    torchrun --nproc-per-node 8 -m benchmarks.paper.sample --model wan --weights DIR --prompts FILE --out OUT

Then `python -m benchmarks.paper.tabulate --out OUT`. Defaults are the settings of the paper's authors.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.paper import calibration, methods
from benchmarks.paper.calibration import KINDS
from benchmarks.paper.folder import Folder, Ranks, Unit, save_unit
from benchmarks.paper.models import MODELS, STEPS, Model
from benchmarks.results import environment
from sencache import SensitivityProfile
from sencache.command.options import count
from sencache.command.pipelines import PipelineSource, is_network
from sencache.command.pipelines import prompts as read_prompts
from sencache.plugins.diffusers import Handle
from sencache.plugins.diffusers.store import models_fingerprint

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
LIBRARIES = ("torch", "diffusers", "transformers", "sencache")
UNREPORTED = 1_000_000  # from the first reported seed to the first one of calibration


def parser() -> argparse.ArgumentParser:
    """What can be typed."""
    how = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="benchmarks.paper.sample", description=__doc__, formatter_class=how)
    top.add_argument("--model", required=True, choices=tuple(MODELS))
    top.add_argument("--weights", required=True, help="a folder that `save_pretrained` wrote, or a name on the hub")
    top.add_argument("--prompts", required=True, metavar="FILE", help="one a line; the paper's are VBench's")
    top.add_argument("--out", required=True, metavar="FOLDER")
    top.add_argument("--methods", default="table1", help="names, separated by commas (default table1)")
    top.add_argument("--samples", type=count, help="only the first so many prompts; more can be added later")
    top.add_argument("--steps", type=count, default=STEPS, help=f"of the full run (default {STEPS})")
    top.add_argument("--seed0", type=int, default=42, help="of the first prompt; the next has the next (default 42)")
    top.add_argument("--calibration-prompts", metavar="FILE", help="one a line (default --prompts, with other seeds)")
    top.add_argument("--calibration-samples", type=count, default=8, help="how many of them (default 8)")
    top.add_argument("--dtype", choices=tuple(DTYPES), help="default the model's")
    top.add_argument("--height", type=count, help="in pixels, as --width; default the authors'")
    top.add_argument("--width", type=count)
    top.add_argument("--frames", type=count)
    top.add_argument("--guidance", type=float)
    top.add_argument("--negative-prompt", metavar="PROMPT")
    top.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="any other argument of the pipeline's call"
    )
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2, and one line, for what a user can get wrong."""
    try:
        with torch.no_grad():
            sample(parser().parse_args(arguments))
    except (ValueError, OSError, ImportError) as error:
        print(f"benchmarks.paper.sample: {error}", file=sys.stderr)
        return 2
    return 0


def sample(options: argparse.Namespace) -> None:
    """Calibrate what is needed, and make every video that is not there."""
    model, ranks, folder = MODELS[options.model], Ranks(), Folder(options.out)
    wanted = methods.chosen(options.methods, model, options.steps)
    source = open_source(options, model, ranks.device)
    folder.open(manifest(options, source), ranks)
    profiles = {
        kind: calibrated(kind, options, source, folder, ranks)
        for kind in KINDS
        if any(method.needs == kind for method in wanted.values())
    }
    numbers = range(min(options.samples or len(source.prompts), len(source.prompts)))
    # A method after the other, so that every rank has its share of the dear ones and of the cheap.
    mine = ranks.share([(name, number) for name in wanted for number in numbers])
    missing = [(name, number) for name, number in mine if not folder.unit(name, number).exists()]
    print(f"Rank {ranks.number}: {len(missing)} of {len(mine)} videos to make.", flush=True)
    if missing:
        calls = warm_up(source)
        for name in dict.fromkeys(name for name, _ in missing):
            method = wanted[name]
            with method.scope(source, profiles.get(method.needs)) as handle:
                for number in (number for other, number in missing if other == name):
                    unit = make(source, handle, method.steps, number, calls, ranks.device)
                    save_unit(folder.unit(name, number), unit)
                    spent = f"{unit.facts['evaluations']:g} evaluations, {unit.facts['seconds']:.1f} s"
                    print(f"Rank {ranks.number}: {name} {number}: {spent}", flush=True)
    ranks.wait()
    ranks.leave()


def open_source(options: argparse.Namespace, model: Model, device: str) -> PipelineSource:
    """The pipeline, sampled as the authors do unless the options say otherwise."""
    given = {name: getattr(options, name) or getattr(model, name) for name in ("height", "width", "frames")}
    given["guidance"] = model.guidance if options.guidance is None else options.guidance
    given["negative_prompt"] = model.negative_prompt if options.negative_prompt is None else options.negative_prompt
    source = PipelineSource(
        argparse.Namespace(
            pipeline=options.weights, prompt=None, prompts=options.prompts, steps=options.steps, seed=options.seed0,
            dtype=DTYPES[options.dtype or model.dtype], device=device, option=options.option, **given,
        )
    )  # fmt: skip
    if source.span is None:
        raise ValueError(f"Expected a pipeline with a VAE, whose samples are videos; {options.weights} has none.")
    source.given = {**model.options, **source.given}
    pipe = source.pipe
    known = {name: value for name, value in model.scheduler.items() if name in pipe.scheduler.config}
    if known:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **known)
    model.prepare(pipe)
    return source


def manifest(options: argparse.Namespace, source: PipelineSource) -> dict[str, Any]:
    """What the videos depend on, and where they are made."""
    networks = {name: part for name, part in source.pipe.components.items() if is_network(name) and part is not None}
    scheduler = {name: value for name, value in source.pipe.scheduler.config.items() if not name.startswith("_")}
    own = calibration_source(options, source)
    here = environment()
    return {
        "settings": {
            "model": options.model,
            "weights": models_fingerprint(networks),
            "dtype": options.dtype or MODELS[options.model].dtype,
            "steps": options.steps,
            "seed0": options.seed0,
            "prompts": digest(source.prompts),
            "call": source.given,
            "scheduler": {"class": type(source.pipe.scheduler).__name__, **scheduler},
            "calibration": {"prompts": digest(own.prompts), "samples": options.calibration_samples},
        },
        "libraries": {name: here[name] for name in LIBRARIES},
        "environment": here,
        "weights": options.weights,
        "prompts": options.prompts,
    }


def calibration_source(options: argparse.Namespace, source: PipelineSource) -> PipelineSource:
    """The same pipeline with the prompts of calibration; its first seed is none of those that are reported."""
    own = copy.copy(source)
    own.first = options.seed0 + UNREPORTED
    if options.calibration_prompts:
        own.prompts = read_prompts(argparse.Namespace(prompt=None, prompts=options.calibration_prompts))
    return own


def calibrated(
    kind: str, options: argparse.Namespace, source: PipelineSource, folder: Folder, ranks: Ranks
) -> SensitivityProfile:
    """The profile of all calibration samples, of which each rank measures its share."""
    own, numbers = calibration_source(options, source), range(options.calibration_samples)
    for number in ranks.share(numbers):
        file = folder.calibration(kind, number)
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            KINDS[kind](own, own.first + number).save(file)
            print(f"Rank {ranks.number}: calibration {kind} {number}", flush=True)
    ranks.wait()
    return calibration.joined([SensitivityProfile.load(folder.calibration(kind, number)) for number in numbers])


def warm_up(source: PipelineSource) -> float:
    """A short run, which is not timed; returns how often a step calls the network, guidance included."""
    steps = min(2, source.steps)
    return source.timed("warm up", range(source.first, source.first + 1), steps).evaluations / steps


def make(source: PipelineSource, handle: Any, steps: int, number: int, calls: float, device: str) -> Unit:
    """One video. `calls`: of the network, in a step. `handle`: that of a cache, which counts evaluations itself.

    Where blocks are reused the network is called for embeddings and head at every step.
    """
    cuda, seed = device.startswith("cuda"), source.first + number
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    outcome = source.timed("sample", range(seed, seed + 1), steps)
    facts = {
        "prompt": source.prompts[number],
        "seed": seed,
        "evaluations": (evaluated(handle) if isinstance(handle, Handle) else outcome.evaluations) / calls,
        "seconds": outcome.seconds,
        "peak_memory": torch.cuda.max_memory_allocated(device) if cuda else None,
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
    }
    return Unit((255 * outcome.samples[0]).round().clamp(0, 255).to(torch.uint8), facts)


def evaluated(handle: Handle) -> int:
    """How many calls of the last run were evaluated."""
    return sum(bool(query.computed.any()) for query in handle.report.trace)


def digest(lines: list[str]) -> str:
    """Tells lists of prompts apart."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
