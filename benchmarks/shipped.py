"""The shipped SiT as a field, and who may be looked at when: three sets of seeds that never meet."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.fields.sit import SiT
from sencache import SensitivityProfile
from sencache.adapters.sit import SiTField
from solvers import grids

FIELDS = Path(__file__).parent / "fields"
SEEDS = {"calibration": 10_000, "choosing": 20_000, "reported": 30_000}  # profiles, settings, published numbers
GUIDANCE = 2.0
STEPS = 50
GRID = grids.uniform(STEPS)  # noise at t = 1, data at t = 0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sit_field(samples: int, guidance: float = GUIDANCE) -> SiTField:
    """The shipped SiT for `samples` images, their classes in turn."""
    model = SiT.load(FIELDS / "sit.safetensors").to(DEVICE)
    return SiTField(model, torch.arange(samples, device=DEVICE) % model.num_classes, guidance=guidance, data_at=0)


def sit_profile() -> SensitivityProfile:
    """What `python -m benchmarks.fields.calibrate_sit` measured on it."""
    return SensitivityProfile.load(FIELDS / "sit.profile.safetensors")


def noise(samples: int, purpose: str) -> Tensor:
    """x_T (samples, 1, 32, 32); `purpose` is a set of `SEEDS`."""
    generator = torch.Generator().manual_seed(SEEDS[purpose])
    return torch.randn(samples, 1, 32, 32, generator=generator).to(DEVICE)
