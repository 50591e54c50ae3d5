"""The secants of calibration beside the exact Jacobian norms they stand in for (SenCache, Section 4.2, Fig. 3a).

    python -m benchmarks.norms

On the shipped SiT, along the calibration samples' own trajectories; medians over 8 samples, as Markdown.
"""

from __future__ import annotations

import torch

from benchmarks.shipped import GRID, noise, sit_field, sit_profile
from sencache import jacobian_norms
from solvers import trajectory

SHOWN = (0, 10, 20, 30, 40, 45, 48)  # steps of the grid

if __name__ == "__main__":
    field, profile, x = sit_field(8), sit_profile(), noise(8, "calibration")
    states = [x, *(step.x for step in trajectory(field, x, GRID))]
    assert profile.samples_x is not None
    assert profile.samples_t is not None
    print("| t | secant of Eq. 11 | spectral norm of J_x | Frobenius / sqrt(d) | secant of Eq. 12 | RMS of J_t |")
    print("|" + "---|" * 6)
    for k in SHOWN:
        exact = jacobian_norms(field, states[k], GRID[k], iterations=20)
        random_gain = exact.frobenius / x[0].numel() ** 0.5
        numbers = (profile.samples_x[:, k], exact.spectral, random_gain, profile.samples_t[:, k], exact.time)
        print(f"| {GRID[k]:.2f} | " + " | ".join(f"{torch.as_tensor(v).median():.2f}" for v in numbers) + " |")
