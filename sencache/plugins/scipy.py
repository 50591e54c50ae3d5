"""SciPy's `solve_ivp` calls `fun(t, y, *args)` with a float t and a flat float64 array y.

    with scipy.wrap(fun, profile, ts, method="RK45", nfe=20) as cached:
        solve_ivp(cached, (ts[0], ts[-1]), y0, method="RK45", **scipy.fixed_steps(ts))

What is cached is what fun returns. The explicit methods are meant to choose their steps by an error estimate, which
reused outputs fool: `fixed_steps` keeps them from it, and a query at any other time is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.integrate
import torch
from torch import Tensor

from sencache.plugins.host import IMPLICIT, Method, calling
from sencache.plugins.hosted import Hosted, HostedModule, hosted
from sencache.profile import SensitivityProfile
from solvers import Stepper, VelocityField, Weights
from solvers.loop import check_grid


@dataclass(frozen=True)
class RungeKutta:
    """A step of SciPy's explicit Runge-Kutta methods, with the evaluation at its end that its error estimate takes."""

    method: str
    adaptive = False

    @property
    def order(self) -> int:
        return {"RK23": 3, "RK45": 5, "DOP853": 8}[self.method]

    def weights(self, t: Tensor, t_next: Tensor) -> Weights:
        return Weights(torch.ones_like(t), t_next - t)

    def advance(self, field: VelocityField, x: Tensor, t: Tensor, t_next: Tensor, memory: None) -> tuple[Tensor, None]:
        tableau, h = getattr(scipy.integrate, self.method), t_next - t
        stages: list[Tensor] = []
        for s in range(tableau.n_stages):
            inner = sum((float(a) * k for a, k in zip(tableau.A[s], stages, strict=False)), torch.zeros_like(x))
            stages.append(field(x + h * inner, t + h * float(tableau.C[s])))
        dx = h * sum((float(b) * k for b, k in zip(tableau.B, stages, strict=True)), torch.zeros_like(x))
        field(x + dx, t_next)
        return dx, None


METHODS: dict[str, Stepper] = {name: RungeKutta(name) for name in ("RK23", "RK45", "DOP853")}
REFUSED = dict.fromkeys(("Radau", "BDF", "LSODA"), IMPLICIT)


@contextmanager
def wrap(
    fun: Callable[..., Any],
    profile: SensitivityProfile | None,
    ts: Any,
    *,
    method: Method = "RK45",
    force: bool = False,
    **options: Any,
) -> Iterator[Hosted | HostedModule]:
    """fun for one trajectory over ts (K + 1,), equal steps.

    method: "RK23", "RK45" or "DOP853". The implicit ones, and steps chosen by the error estimate, are refused unless
        `force` is given. Options are `CachedField`'s; y is one sample (1, d).

    The stages of RK45 and DOP853 stand at nearly the same times, off the trajectory in different ways: a line through
    two of them leads astray, so that there `reuse` is "hold" by default.
    """
    if method in ("RK45", "DOP853"):
        options.setdefault("reuse", "hold")
    with calling(
        fun, profile, torch.as_tensor(ts, device="cpu"), method, METHODS, REFUSED, force=force, **options
    ) as calls:

        def cached(t: float, y: np.ndarray, *args: Any) -> np.ndarray:
            x = torch.tensor(y, device="cpu")[None]  # a copy: solve_ivp writes into its own
            dy = calls.ask(x, float(t), lambda: torch.tensor(np.asarray(fun(t, y, *args)), device="cpu")[None], *args)
            return dy[0].numpy()

        yield hosted(fun, calls, cached)


def fixed_steps(ts: Any) -> dict[str, float]:
    """What `solve_ivp` is to be told, so that it steps over ts (K + 1,) and over nothing else."""
    steps = check_grid(torch.as_tensor(ts, device="cpu")).double().diff().abs()
    if not torch.allclose(steps, steps[0].expand_as(steps), rtol=1e-5):
        raise ValueError(f"`solve_ivp` can be held to equal steps only; got steps from {steps.min()} to {steps.max()}.")
    step = float(steps.mean()) * (1 + 1e-9)  # else rounding leaves a sliver of a step at the end
    return dict(first_step=min(step, float(steps.sum())), max_step=step, rtol=1.0, atol=math.inf)


def field(fun: Callable[..., Any], *args: Any) -> VelocityField:
    """fun on rows of states (B, d), for `calibrate`."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        rows = [np.asarray(fun(float(t), row.double().numpy(), *args)) for row in x.cpu()]
        return torch.from_numpy(np.stack(rows)).to(x)

    return velocity
