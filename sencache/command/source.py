"""What can be measured and compared: a field or a pipeline, sampled in full or in part. Shapes: samples (B, ...)."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from sencache.profile import SensitivityProfile

FRAMES = 4  # of a video that are shown


class Outcome(NamedTuple):
    """What a way of sampling gave for some seeds."""

    samples: Tensor  # (B, ...) on the host
    evaluations: float  # a sample, counted at the network
    seconds: float  # a sample
    expected: float = float("nan")  # relative error, said beforehand


class Source(Protocol):
    """A field or a pipeline."""

    steps: int  # of the full run
    few: int  # how many samples to take unless told
    method: str  # the sampler's name
    counted: str  # what `evaluations` are
    span: float | None  # of the data, for PSNR; None where samples are no pictures

    def measured(self, seeds: range, secants: bool, file: str | None) -> SensitivityProfile:
        """The profile of full runs from these seeds; `file` keeps what a field gave so far."""
        ...

    def rehearsed(self, profile: SensitivityProfile, seeds: range) -> SensitivityProfile:
        """The profile with what plans made of these seeds."""
        ...

    def check(self, profile: SensitivityProfile, budgets: list[int]) -> None:
        """Raise where the profile is of something else."""
        ...

    def full(self, seeds: range) -> Outcome:
        """All steps evaluated."""
        ...

    def cached(self, seeds: range, profile: SensitivityProfile, nfe: int) -> Outcome:
        """All steps taken, `nfe` of them evaluated."""
        ...

    def fewer(self, seeds: range, nfe: int) -> tuple[int, Outcome]:
        """The number of steps that `nfe` evaluations pay for, and these steps, all evaluated."""
        ...

    def picture(self, sample: Tensor, full: Tensor) -> Any:
        """A sample as (H, W) or (H, W, 3) numbers in [0, 1], `full` being the same seed's sample in full."""
        ...


def plain_picture(sample: Tensor, full: Tensor) -> Any:
    """A sample that is no picture: its first channel, some frames of it or the vector, in the range of `full`."""
    low, high = float(full.min()), float(full.max())
    values = ((sample.float() - low) / max(high - low, 1e-12)).clamp(0, 1)
    if values.ndim == 4:  # (C, F, H, W)
        return side_by_side([frame.numpy() for frame in some(values[0])])
    while values.ndim > 2:
        values = values[0]
    return (values[None] if values.ndim == 1 else values).numpy()


def some(frames: Tensor) -> list[Tensor]:
    """A few frames of (F, ...), the first and the last among them."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(int))
    return [frames[k] for k in chosen]


def side_by_side(pictures: list[Any]) -> Any:
    """Pictures (H, W) or (H, W, 3) in a row."""
    return np.concatenate(pictures, axis=1)


def seeds_in_words(seeds: range) -> str:
    """'seed 3' or 'seeds 3 to 7'."""
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
