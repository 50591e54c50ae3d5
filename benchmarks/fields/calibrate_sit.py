"""Measure the shipped profile of the shipped SiT: 8 samples along their own 50-step trajectories, guidance 2.

python -m benchmarks.fields.calibrate_sit
"""

from __future__ import annotations

from benchmarks.shipped import FIELDS, GRID, noise, sit_field
from sencache import calibrate

if __name__ == "__main__":
    calibrate(sit_field(8), noise(8, "calibration"), GRID).save(FIELDS / "sit.profile.safetensors")
