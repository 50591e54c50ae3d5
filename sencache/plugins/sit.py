"""SiT's own samplers (Ma et al. 2024): they call `model(x, t (B,), **model_kwargs)`, noise at t = 0, data at 1.

    with sit.wrap(model.forward_with_cfg, profile, ts, nfe=20) as cached:
        sampler.sample_ode(sampling_method="euler", num_steps=50)(z, cached, y=y, cfg_scale=4.0)

What is cached is the model's output, whatever the transport takes it for. The model, with its guidance inside, is
always called with the whole batch: `forward_with_cfg` takes it in halves. A profile measured in the papers' time, noise
at 1, is mirrored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sencache.plugins.host import Method, calling
from sencache.plugins.hosted import Hosted, HostedModule, hosted
from sencache.plugins.torchdiffeq import METHODS, REFUSED
from sencache.profile import SensitivityProfile
from solvers import EulerMaruyama, Path, Stepper, VelocityField, Weights


@dataclass(frozen=True)
class SDE:
    """SiT's Euler-Maruyama, without its noise: v = drift, w / 2 = diffusion in its `sample_sde`.

    path: the transport's, with data at 1. diffusion, norm: its `diffusion_form` and `diffusion_norm`.
    """

    path: Path
    diffusion: str = "SBDM"
    norm: float = 1.0
    order = 0.5
    adaptive = False
    noise = None

    @property
    def linear(self) -> Stepper:
        return EulerMaruyama(self.path, lambda x, t, t_next: torch.zeros_like(x), self.diffusion, self.norm)

    def weights(self, t: Tensor, t_next: Tensor) -> Weights:
        return self.linear.weights(t, t_next)

    def advance(self, field: VelocityField, x: Tensor, t: Tensor, t_next: Tensor, memory: None) -> tuple[Tensor, None]:
        return self.linear.advance(field, x, t, t_next, memory)


@contextmanager
def wrap(
    model: Callable[..., Tensor],
    profile: SensitivityProfile | None,
    ts: Tensor,
    *,
    method: Method = "euler",
    force: bool = False,
    **options: Any,
) -> Iterator[Hosted | HostedModule]:
    """The model for one trajectory over ts (K + 1,), rising.

    SiT's `num_steps` counts times: its ODE grid is ``torch.linspace(t0, t1, num_steps)``.

    method: torchdiffeq's name for an ODE of a velocity model; an `SDE` of the same diffusion for its SDE, whose grid
        ends with the last step; None where the model predicts something else. Options are `CachedField`'s.
    """
    with calling(model, profile, ts, method, METHODS, REFUSED, mirror=True, force=force, **options) as calls:

        def cached(x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return calls.ask(x, t, lambda: model(x, t, *args, **kwargs), *args, **kwargs)

        yield hosted(model, calls, cached)


def field(model: Callable[..., Tensor], *args: Any, **kwargs: Any) -> VelocityField:
    """The model with t in SiT's shape and its conditioning, for `calibrate`."""
    return lambda x, t: model(x, torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x)), *args, **kwargs)
