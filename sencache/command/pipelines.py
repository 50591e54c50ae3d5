"""A diffusers pipeline named on the command line, run once for each seed. Shapes: samples (B, ...)."""

from __future__ import annotations

import argparse
import inspect
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sencache.checks import check_model
from sencache.command.fields import device
from sencache.command.source import Outcome, plain_picture, side_by_side, some
from sencache.plugins.diffusers import Handle, disable, enable
from sencache.plugins.diffusers.load import load
from sencache.plugins.diffusers.store import models_fingerprint
from sencache.profile import SensitivityProfile

NAMES = {"height": "height", "width": "width", "frames": "num_frames", "guidance": "guidance_scale"}


class PipelineSource:
    """A pipeline with prompts; what it returns is decoded, or latents where it has no VAE."""

    counted = "transformer calls"

    def __init__(self, options: argparse.Namespace):
        self.prompts = prompts(options)
        self.given, self.few = arguments(options), len(self.prompts)
        self.steps, self.first = options.steps or 50, options.seed
        self.pipe = load(options.pipeline, getattr(torch, options.dtype or "float32"), device(options.device))
        decodes = getattr(self.pipe, "vae", None) is not None
        self.given = {"output_type": "np" if decodes else "latent"} | self.given
        self.span = 1.0 if self.given["output_type"] == "np" else None  # decoded samples are in [0, 1]
        self.method = type(self.pipe.scheduler).__name__
        self._check_arguments(options)

    def measured(self, seeds: range, secants: bool, file: str | None) -> SensitivityProfile:
        """The Gram matrix and no sensitivities; of several runs, as if it had been one."""
        profiles = []
        for seed in seeds:
            with self.enabled("calibrate") as handle:
                self._run("calibrate", seed, self.steps)
                if handle.profile is None:
                    raise ValueError(
                        f"{type(self.pipe).__name__} walked no whole grid of its scheduler in this run, so that "
                        "nothing was measured. It should call a transformer or UNet between the scheduler's steps."
                    )
                profiles.append(handle.profile)
        gram, size = (torch.cat([getattr(one, name) for one in profiles]) for name in ("gram", "size"))
        return replace(profiles[0], gram=gram, size=size, facts={**profiles[0].facts, "samples": len(gram)})

    def rehearsed(self, profile: SensitivityProfile, seeds: range) -> SensitivityProfile:
        with self.enabled("rehearse", profile=profile) as handle:
            return handle.rehearse([partial(self._run, "rehearse", seed, self.steps) for seed in seeds])

    def check(self, profile: SensitivityProfile, budgets: list[int]) -> None:
        with self.enabled("check", profile=profile) as handle:
            check_model(profile, models_fingerprint(handle.models()))

    def full(self, seeds: range) -> Outcome:
        self._run("warm up", seeds[0], min(2, self.steps))  # what is loaded or compiled is no part of the timing
        return self.timed("full", seeds, self.steps)

    def cached(self, seeds: range, profile: SensitivityProfile, nfe: int) -> Outcome:
        with self.enabled(f"nfe={nfe}", profile=profile, nfe=nfe) as handle:
            outcome = self.timed(f"nfe={nfe}", seeds, self.steps)
            expected = 0.0 if handle.plan is None else handle.plan.relative_error
        return outcome._replace(expected=expected)

    def fewer(self, seeds: range, nfe: int) -> tuple[int, Outcome]:
        return nfe, self.timed(f"{nfe} steps", seeds, nfe)

    def picture(self, sample: Tensor, full: Tensor) -> Any:
        if self.span is None:
            return plain_picture(sample, full)
        frames = some(sample) if sample.ndim == 4 else [sample]
        return side_by_side([frame.float().clamp(0, 1).squeeze(-1).numpy() for frame in frames])

    @contextmanager
    def enabled(self, name: str, **options: Any) -> Iterator[Handle]:
        """The pipeline cached, with nothing known from other sessions."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                yield enable(self.pipe, folder=folder, **options)
            finally:
                disable(self.pipe)

    def timed(self, name: str, seeds: range, steps: int) -> Outcome:
        calls, models = 0, [one for part, one in self.pipe.components.items() if is_network(part) and one is not None]

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        hooks = [model.register_forward_hook(count) for model in models]
        try:
            begin = time.perf_counter()
            samples = [self._run(name, seed, steps) for seed in seeds]
            spent = time.perf_counter() - begin
        finally:
            for one in hooks:
                one.remove()
        return Outcome(torch.cat(samples), calls / len(seeds), spent / len(seeds))

    def _run(self, name: str, seed: int, steps: int) -> Tensor:
        """One sample (1, ...) on the host."""
        self.pipe.set_progress_bar_config(desc=f"{name}, seed {seed}", leave=False, disable=None)
        result = self.pipe(
            prompt=self.prompts[(seed - self.first) % len(self.prompts)],
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            return_dict=False,
            **self.given,
        )[0]
        return torch.from_numpy(np.asarray(result)) if not isinstance(result, Tensor) else result.cpu()

    def _check_arguments(self, options: argparse.Namespace) -> None:
        known = inspect.signature(self.pipe.__call__).parameters
        words = {name: f"--{word}" for word, name in NAMES.items()} | {"negative_prompt": "--negative-prompt"}
        for name in ["prompt", "num_inference_steps", "generator", "return_dict", *self.given]:
            if name not in known:
                said = f" ({words[name]})" if name in words else ""
                raise ValueError(f"{type(self.pipe).__name__} takes no {name}{said}; it takes {', '.join(known)}.")


def is_network(name: str) -> bool:
    """Whether a part of a pipeline is what the cache spares calls of."""
    return name.startswith(("transformer", "unet"))


def prompts(options: argparse.Namespace) -> list[str]:
    """The prompts of --prompt, then those of the file --prompts."""
    found = list(options.prompt or [])
    if options.prompts:
        if not Path(options.prompts).is_file():
            raise ValueError(f"--prompts is a file of one prompt a line; {options.prompts} is none.")
        found += [line for line in Path(options.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not found:
        raise ValueError('--pipeline needs a prompt: --prompt "a cat on a wall", or --prompts FILE with one a line.')
    return found


def arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What the pipeline's call is given besides prompt, steps and generator."""
    named = {name: getattr(options, word) for word, name in NAMES.items()}
    found = {name: value for name, value in named.items() if value is not None}
    if options.negative_prompt is not None:
        found["negative_prompt"] = options.negative_prompt
    for pair in options.option or []:
        name, equals, value = pair.partition("=")
        if not name.isidentifier() or not equals:
            raise ValueError(f"--option is NAME=VALUE, such as --option max_sequence_length=256; got {pair!r}.")
        found[name] = value_of(value)
    return found


def value_of(text: str) -> Any:
    """A number, true, false, null or a list as JSON has them, else the text itself."""
    read: Callable[[str], Any] = json.loads
    try:
        return read(text)
    except json.JSONDecodeError:
        return text
