"""The fields that everything is compared on: how each is sampled, and how its samples are looked at.

Every model is sampled as its big brother is: Wan and LTX by Euler on shifted grids, CogVideoX by DDIM. Seeds come in
three sets that never meet (`benchmarks.shipped.SEEDS`); scenes are drawn for each, so some are in two of them.
Shapes: samples x (B, ...) as the model has them; pixels (B, C, H, W) or (B, C, F, H, W) in [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.fields import video
from benchmarks.fields.bunny import Latents
from benchmarks.fields.sit import SiT
from benchmarks.shipped import DEVICE, FIELDS, SEEDS
from sencache import SensitivityProfile
from sencache.adapters.sit import SiTField
from solvers import DPMSolverPP, Euler, Linear, Path, Stepper, Tabulated, grids

STEPS = 50


class Samples(NamedTuple):
    """What a run starts from: the field, noise x (B, ...), and the classes or scenes (B,) that the field is of."""

    field: Any
    x: Tensor
    conditions: Tensor


@dataclass(frozen=True)
class Case:
    """A field with its usual sampler."""

    name: str
    path: Path
    stepper: Stepper
    shift: float  # of the grid
    guidance: float

    def grid(self, steps: int = STEPS) -> Tensor:
        """The times (steps + 1,) of its usual grid."""
        return grids.shifted(steps, self.shift)

    def samples(self, count: int, purpose: str) -> Samples:
        """`count` samples of a set of seeds: the first of a larger set are those of a smaller one."""
        generator = torch.Generator().manual_seed(SEEDS[purpose])
        if self.name == "sit":
            x = torch.randn(count, 1, 32, 32, generator=generator)
        else:
            x = torch.stack([torch.randn(video.SHAPE, generator=generator) for _ in range(count)])
            x = video.packed(self.name, x)
        conditions = self.conditions(count, purpose)
        return Samples(self.field(conditions), x.to(DEVICE), conditions)

    def conditions(self, count: int, purpose: str) -> Tensor:
        """The classes or scenes (count,) of a set of seeds."""
        if self.name == "sit":
            return torch.arange(count, device=DEVICE) % 10
        order = torch.randperm(video.SCENES, generator=torch.Generator().manual_seed(SEEDS[purpose] + 1))
        return order[torch.arange(count) % video.SCENES].to(DEVICE)

    def field(self, conditions: Tensor, guidance: float | None = None, model: nn.Module | None = None) -> Any:
        """The field of these classes or scenes (B,), of the trained model or of `model` in its place."""
        scale, model = self.guidance if guidance is None else guidance, model or self.model
        if self.name == "sit":
            return SiTField(model, conditions, guidance=scale, data_at=0)
        return video.field(self.name, model, conditions, scale)

    @property
    def model(self) -> nn.Module:
        """The trained model, loaded once."""
        return _model(self.name)

    @property
    def profile(self) -> SensitivityProfile:
        """What was measured on its calibration seeds, shipped beside the checkpoint."""
        return SensitivityProfile.load(FIELDS / f"{self.name}.profile.safetensors")

    def pixels(self, x: Tensor) -> Tensor:
        """Samples as they are looked at: of videos the decoded ones, clamped."""
        if self.name == "sit":
            return x
        return Latents.load().to(x.device).decode(video.unpacked(self.name, x).float())


@cache
def _model(name: str) -> nn.Module:
    return (SiT.load(FIELDS / "sit.safetensors") if name == "sit" else video.load(name)).to(DEVICE)


def cases() -> dict[str, Case]:
    """By name."""
    table = Tabulated(video.alphas_cumprod())
    linear = partial(Case, path=Linear(), stepper=Euler())
    return {
        "sit": linear("sit", shift=1.0, guidance=2.0),
        "wan": linear("wan", shift=3.0, guidance=2.0),
        "ltx": linear("ltx", shift=2.6, guidance=2.0),
        "cogvideox": Case("cogvideox", table, DPMSolverPP(table, order=1), shift=1.0, guidance=2.0),
    }
