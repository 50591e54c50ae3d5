"""In which of its shapes a prediction is best continued: `python -m benchmarks.coordinates`, for docs/hosts.md.

The same Euler run of the shipped SiT, which caches the velocity on the linear path, that on the cosine path, the noise
or the data: PSNR in dB to all 50 evaluations, the median over 16 images, at 25 and 15 evaluations with corrections.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.hosts import START, k_diffusion_sampling
from benchmarks.metrics import psnr
from benchmarks.shipped import noise, sit_field
from sencache import CachedField, calibrate
from solvers import Cosine, DPMSolverPP, Euler, Stepper, VelocityField, Weights, grids, integrate

COSINE = Cosine()


@dataclass(frozen=True)
class OfPrediction:
    """Euler on the linear path, of a field that predicts the data or the noise."""

    data: bool
    order = 1
    adaptive = False

    def weights(self, t: Tensor, t_next: Tensor) -> Weights:
        if self.data:
            return Weights(t_next / t, 1 - t_next - (1 - t) * t_next / t)
        return Weights((1 - t_next) / (1 - t), t_next - t * (1 - t_next) / (1 - t))

    def advance(self, field: VelocityField, x: Tensor, t: Tensor, t_next: Tensor, memory: None) -> tuple[Tensor, None]:
        state, gain = self.weights(t, t_next)
        return (state - 1) * x + gain * field(x, t), None


def on_cosine(field: VelocityField) -> VelocityField:
    def velocity(x: Tensor, u: Tensor) -> Tensor:
        c = COSINE.coefficients(u)
        t, x = c.sigma / (c.alpha + c.sigma), x / (c.alpha + c.sigma).to(x)
        v = field(x, t)
        return c.dalpha.to(x) * (x - t.to(x) * v) + c.dsigma.to(x) * (x + (1 - t).to(x) * v)

    return velocity


SHAPES: dict[str, tuple[Callable[[VelocityField], VelocityField], Stepper]] = {
    "velocity on the linear path": (lambda field: field, Euler()),
    "velocity on the cosine path": (on_cosine, DPMSolverPP(COSINE, 1)),
    "noise": (lambda field: lambda x, t: x + (1 - t).to(x) * field(x, t), OfPrediction(data=False)),
    "data": (lambda field: lambda x, t: x - t.to(x) * field(x, t), OfPrediction(data=True)),
}


def measured(name: str, ts: Tensor, samples: int = 16) -> list[float]:
    """The median PSNR at 25 and 15 evaluations on the grid ts (K + 1,) of the linear path."""
    shape, stepper = SHAPES[name]
    ts = COSINE.time_of(((1 - ts) / ts).log()) if "cosine" in name else ts
    field, x = shape(sit_field(samples)), noise(samples, "choosing")
    own = noise(8, "calibration")
    profile = calibrate(shape(sit_field(8)), own, ts, stepper, secants=False, progress=False)
    full = integrate(field, x, ts, stepper)
    ends = [CachedField(field, profile, nfe=nfe).integrate(x, ts, stepper) for nfe in (25, 15)]
    return [float(psnr(end, full).median()) for end in ends]


def main() -> None:
    karras = k_diffusion_sampling().get_sigmas_karras
    sigmas = {"sigma 0.002 to 80": karras(50, 0.002, 80), "sigma 0.03 to 15": karras(50, 0.03, 15)}
    walks = {"uniform in t": grids.uniform(50, start=START)}
    walks |= {f"Karras, {name}": (s.double() / (1 + s.double())) for name, s in sigmas.items()}
    print("| | " + " | ".join(walks) + " |")
    print("|---|" + "---|" * len(walks))
    with torch.no_grad():
        for name in SHAPES:
            cells = [", ".join(f"{value:.1f}" for value in measured(name, ts)) for ts in walks.values()]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
