"""Options that `calibrate` and `compare` share: what is sampled, and how; and checks of files."""

from __future__ import annotations

import argparse
from pathlib import Path

from sencache.command.fields import STEPPERS, FieldSource
from sencache.command.pipelines import PipelineSource
from sencache.command.source import Source
from sencache.profile import SensitivityProfile

OF_FIELDS = ("shape", "start", "end", "shift", "stepper")
OF_PIPELINES = ("prompt", "prompts", "negative_prompt", "guidance", "height", "width", "frames", "option")


def add_source(parser: argparse.ArgumentParser, seed: int) -> None:
    """Options that name a field or a pipeline; `seed` is the default of the first seed."""
    what = parser.add_argument_group("what is sampled, one of")
    one = what.add_mutually_exclusive_group(required=True)
    one.add_argument(
        "--pipeline", metavar="FOLDER_OR_NAME", help="a diffusers pipeline: a folder, or a name on the hub"
    )
    one.add_argument(
        "--field",
        metavar="MODULE:NAME",
        help="a callable v = field(x, t), or a function of the number of samples that returns one; modules are looked "
        "for here too",
    )
    both = parser.add_argument_group("of both")
    both.add_argument("--steps", type=count, help="of the full run (default 50, or those of --profile)")
    both.add_argument("--seed", type=int, default=seed, help=f"of the first sample; the next has the next ({seed})")
    both.add_argument("--samples", type=count, help="how many (default 8, or one for each prompt)")
    both.add_argument("--device", help="cpu, cuda, ... (default cuda where there is one)")
    both.add_argument("--dtype", choices=("float64", "float32", "bfloat16", "float16"), help="default float32")
    field = parser.add_argument_group("of a field")
    field.add_argument("--shape", type=shape, help="of one sample, such as 1x32x32")
    field.add_argument("--start", type=float, help="the time of noise (default 1)")
    field.add_argument("--end", type=float, help="the time of data (default 0)")
    field.add_argument("--shift", type=float, help="more steps at high noise, t -> s t / (1 + (s - 1) t) (default 1)")
    field.add_argument("--stepper", choices=tuple(STEPPERS), help="default euler; the path is the field's, else linear")
    pipe = parser.add_argument_group("of a pipeline")
    pipe.add_argument("--prompt", action="append", help="may be repeated: samples take them in turn")
    pipe.add_argument("--prompts", metavar="FILE", help="one prompt a line")
    pipe.add_argument("--negative-prompt", metavar="PROMPT")
    pipe.add_argument("--guidance", type=float, help="`guidance_scale` (default the pipeline's)")
    pipe.add_argument("--height", type=count, help="in pixels, as --width")
    pipe.add_argument("--width", type=count)
    pipe.add_argument("--frames", type=count, help="of a video")
    pipe.add_argument(
        "--option", action="append", metavar="NAME=VALUE", help="any other argument of the pipeline's call"
    )


def open_source(options: argparse.Namespace, profile: SensitivityProfile | None = None) -> Source:
    """What the options name. Without `steps` and the like a field is sampled as `profile` was measured."""
    kind, others = ("--field", OF_FIELDS) if options.pipeline else ("--pipeline", OF_PIPELINES)
    for name in others:
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} goes with {kind}; leave it out.")
    return PipelineSource(options) if options.pipeline else FieldSource(options, profile)


def load_profile(path: str) -> SensitivityProfile:
    """The profile in a file, or an error that says what there is instead."""
    if not Path(path).is_file():
        there = "is a folder" if Path(path).is_dir() else "does not exist"
        raise ValueError(f"Expected a profile, and {path} {there}. `sencache calibrate --out {path}` writes one.")
    try:
        return SensitivityProfile.load(path)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} is a profile of another version of sencache ({error}). Calibrate anew.") from error


def check_target(path: str, overwrite: bool = True) -> None:
    """Raise before any work where a file cannot be written there."""
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"The folder of {path} does not exist. Make it, or name another file.")
    if Path(path).is_dir():
        raise ValueError(f"Expected the name of a file to write; {path} is a folder.")
    if Path(path).exists() and not overwrite:
        raise ValueError(f"{path} exists. Name another file with --out, or add --overwrite.")


def check_pictures(path: str) -> None:
    """Raise before any work where no picture can be drawn, or none of this kind."""
    try:
        from sencache.plots import kinds

        known = kinds()
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: `pip install 'sencache[plots]'`.") from error
    if Path(path).suffix.lstrip(".") not in known:
        raise ValueError(f"Expected a picture's name, such as picture.png; got {path}. Known are {', '.join(known)}.")
    check_target(path)


def check_nfe(budgets: list[int], steps: int) -> None:
    """Raise where a number of evaluations is not possible in `steps` steps."""
    wrong = [nfe for nfe in budgets if not 1 <= nfe <= steps]
    if wrong:
        raise ValueError(f"--nfe counts evaluated steps, from 1 to the {steps} of the full run; got {wrong[0]}.")


def count(text: str) -> int:
    """1, 2, ..."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected 1, 2, ...; got {text!r}")
    return int(text)


def shape(text: str) -> tuple[int, ...]:
    """The shape of one sample, such as 1x32x32."""
    try:
        return tuple(count(size) for size in text.replace(",", "x").split("x"))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected sizes such as 1x32x32; got {text!r}") from None
