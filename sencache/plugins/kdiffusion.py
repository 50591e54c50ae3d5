"""k-diffusion (Karras et al. 2022): samplers that call `model(x, sigma (B,), **extra)` for the denoised x.

    with kdiffusion.wrap(denoiser, profile, sigmas, nfe=20) as model:
        sample_euler(model, x, sigmas)

What is cached is the velocity on the linear path, at x / (1 + sigma) and t = sigma / (1 + sigma).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sencache.plugins.gaussian import Carrier, Translated, inside, time_of
from sencache.plugins.host import ADAPTIVE, Method, calling
from sencache.plugins.hosted import Hosted, HostedModule, hosted
from sencache.profile import SensitivityProfile
from solvers import DPMSolverPP, Euler, Heun, Linear, Stepper, VelocityField, Weights


@dataclass(frozen=True)
class EulerAncestral:
    """`sample_euler_ancestral` without its noise: Euler down to sigma_down, whose x is taken to the next sigma.

    eta: the share of the ancestral noise; 0 is Euler.
    """

    eta: float = 1.0
    order = 1
    adaptive = False
    noise = None

    @property
    def linear(self) -> EulerAncestral:
        return self

    def weights(self, t: Tensor, t_next: Tensor) -> Weights:
        sigma, sigma_next = t / (1 - t), t_next / (1 - t_next)
        up = self.eta * sigma_next * (1 - (sigma_next / sigma) ** 2).clamp(min=0).sqrt()
        down = (sigma_next**2 - up.minimum(sigma_next) ** 2).sqrt()
        return Weights((1 + down) / (1 + sigma_next), (down - sigma) / ((1 + sigma) * (1 + sigma_next)))

    def advance(self, field: VelocityField, x: Tensor, t: Tensor, t_next: Tensor, memory: None) -> tuple[Tensor, None]:
        state, velocity = self.weights(t, t_next)
        return (state - 1) * x + velocity * field(x, t), None


METHODS: dict[str, Stepper] = {
    "euler": Euler(),
    "euler_ancestral": EulerAncestral(),
    "heun": Heun(),
    "dpmpp_2m": DPMSolverPP(Linear()),
}
REFUSED = dict.fromkeys(("dpm_adaptive", "log_likelihood"), ADAPTIVE)


@contextmanager
def wrap(
    model: Callable[..., Tensor],
    profile: SensitivityProfile | None,
    sigmas: Tensor,
    *,
    method: Method = "euler",
    force: bool = False,
    **options: Any,
) -> Iterator[Hosted | HostedModule]:
    """The denoiser for one trajectory over sigmas (K + 1,), falling, the last one 0 or not.

    method: which sampler will call: "euler", whose steps are corrected, "euler_ancestral", whose steps can be, "heun",
        "dpmpp_2m", a stepper on the linear path, or None for any other, and for churn. Options are `CachedField`'s.
    """
    if method == "euler_ancestral":
        options.setdefault("correct", False)  # what is interpolated goes through noise, and measured worse than a line
    with calling(model, profile, times(sigmas), method, METHODS, REFUSED, force=force, **options) as calls:
        translated = Translated(calls)

        def denoised(x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
            return translated.ask(Carrier(x, 1.0, sigma, "data"), lambda: model(x, sigma, **extra), **extra)

        try:
            yield hosted(model, calls, denoised)
        finally:
            translated.close()


def times(sigmas: Tensor) -> Tensor:
    """The grid (K + 1,) on the linear path, float64, that the sampler walks on sigmas (K + 1,)."""
    return time_of(1.0, sigmas)


def field(model: Callable[..., Tensor], **extra: Any) -> VelocityField:
    """The velocity on the linear path that `calibrate` measures: ``calibrate(field(model), x / (1 + sigmas[0]), ...)``.

    `extra` are the sampler's `extra_args`.
    """

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        at = inside(t)
        sigma = (at / (1 - at)).to(x).expand(len(x))
        wide = x / (1 - at).to(x)
        return Carrier(wide, 1.0, sigma, "data").velocity(model(wide, sigma, **extra)).to(x)

    return velocity
