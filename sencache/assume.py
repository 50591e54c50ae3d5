"""A profile without calibration: what would be measured on data that are Gaussian, with a spread of scales.

Of Gaussian data everything is known in closed form. A direction of standard deviation s in the data has one of
m(t) = sqrt(alpha^2 s^2 + sigma^2) at time t; along it the velocity is v = (m' / m) x, and a sample stays as many
deviations off as it was, so that its outputs are m'(t). What tells one data set from another is how the scales s of
its directions are spread, and schedules ask for little more than that.

Shapes: K steps, d directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sencache.norms import rms
from sencache.profile import SensitivityProfile
from solvers import Path
from solvers.loop import check_grid

DIRECTIONS = 256
MEDIAN, SPREAD = 0.2, 1.5  # of the scales, log-normal: their median, and the deviation of their logarithm


def assumed(path: Path, ts: Tensor) -> SensitivityProfile:
    """The profile of Gaussian data on ts (K + 1,), for budgets (`nfe`) on a field that nobody has measured.

    path: on which the model was trained, from `solvers`. The data are taken to be scaled as models have them, to a
        deviation of 1 or so.

    Its plans spend what they are asked to from the first sample on, with any stepper. How rough the field is nobody has
    measured, so that no error of the sample is expected, and what is predicted of a reuse holds for Gaussian data.
    There is no ||J_t||: under a tolerance everything is evaluated. Raises TypeError for what is no path, and ValueError
    for a grid that is not in the path's time, or on which velocities are not finite.
    """
    if not isinstance(path, Path):
        raise TypeError(f"Expected a path, such as `Linear()`, before the grid; got {path!r}.")
    ts = check_grid(ts).detach().double().cpu()
    if ts.min() < -1e-6 or ts.max() > 1 + 1e-6:
        raise ValueError(f"A path's time runs from 0 to 1; got a grid from {ts[0]:g} to {ts[-1]:g}. Scale it to that.")
    alpha, sigma, dalpha, dsigma = (part.double()[:, None] for part in path.coefficients(ts[:-1]))
    quantiles = (torch.arange(DIRECTIONS, dtype=torch.float64, device="cpu") + 0.5) / DIRECTIONS
    scale = MEDIAN * (SPREAD * torch.special.ndtri(quantiles)).exp()
    deviation = (alpha**2 * scale**2 + sigma**2).sqrt()  # m, (K, d)
    rate = (alpha * dalpha * scale**2 + sigma * dsigma) / deviation**2  # m' / m, the diagonal of J_x
    v = rate * deviation
    infinite = ~v.isfinite().all(1)
    if infinite.any():
        raise ValueError(
            f"On {path} velocities are not finite at t = {ts[:-1][infinite][0]:g}, and the grid asks for one there. "
            "Leave that end of time out, or is `data_at` the other end?"
        )
    facts = {
        "assumed": f"Gaussian data of scales around {MEDIAN:g}",
        "path": str(path),
        "grid": f"{len(ts) - 1} steps from {ts[0]:g} to {ts[-1]:g}",
    }
    alpha_x, unknown = rms(rate * v) / rms(v), torch.full_like(ts[:-1], torch.nan)
    return SensitivityProfile(ts[:-1], alpha_x, unknown, gram=(v @ v.T / DIRECTIONS)[None], end=ts[-1], facts=facts)
