"""Measure the shipped profiles of the shipped video models: 8 samples along their own 50-step trajectories.

python -m benchmarks.fields.calibrate_video wan ltx cogvideox
"""

from __future__ import annotations

import sys

import torch

from benchmarks.cases import cases
from benchmarks.shipped import FIELDS
from sencache import calibrate

if __name__ == "__main__":
    torch.set_grad_enabled(False)
    for name in sys.argv[1:]:
        case = cases()[name]
        field, x, _ = case.samples(8, "calibration")
        calibrate(field, x, case.grid(), case.stepper).save(FIELDS / f"{name}.profile.safetensors")
