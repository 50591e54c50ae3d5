"""torchsde (Li et al. 2020): `sdeint(sde, y0, ts)` calls `sde.f(t, y)`, the drift, with y (B, d).

    with torchsde.wrap(sde, profile, ts, method="euler", nfe=20) as cached:
        sdeint(cached, y0, ts[[0, -1]], dt=..., method="euler")

What is cached is the drift; `sde.g`, the noise and everything else stay the sde's own. torchsde calls the drift a few
times at the first (t, y) before it begins, which costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sencache.plugins.host import Calls, Method, calling
from sencache.profile import SensitivityProfile
from sencache.report import Report
from solvers import Euler, Stepper, VelocityField

METHODS: dict[str, Stepper] = {"euler": Euler()}


@contextmanager
def wrap(
    sde: Any,
    profile: SensitivityProfile | None,
    ts: Tensor,
    *,
    method: Method = "euler",
    force: bool = False,
    **options: Any,
) -> Iterator[CachedSDE]:
    """The sde for one trajectory over ts (K + 1,), rising, every step that `dt` makes.

    method: "euler", whose steps are corrected, or None for any other of fixed steps. With `adaptive=True` the solver
        asks at other times, which raises an error, unless `force` is given. Options are `CachedField`'s.
    """
    joint = [name for name in ("f_and_g", "f_and_g_prod") if hasattr(sde, name)]
    if joint or not hasattr(sde, "f"):
        came = ", ".join(joint) or "no f"
        raise TypeError(
            f"The drift is cached by itself, so the sde must have `f(t, y)` and `g(t, y)`; it has {came}. Write the "
            "drift as a method of its own."
        )
    with calling(sde, profile, ts, method, METHODS, unchecked=True, adjoint=True, force=force, **options) as calls:
        yield CachedSDE(sde, calls)


class CachedSDE(nn.Module):
    """The sde with its drift from memory; `report` tells how its trajectory went."""

    def __init__(self, sde: Any, calls: Calls):
        super().__init__()
        self.sde, self._calls = sde, calls

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self._calls.ask(y, t, lambda: self.sde.f(t, y))

    @property
    def report(self) -> Report:
        return self._calls.report

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name in ("sde", "_calls") else getattr(self.sde, name)


def field(sde: Any) -> VelocityField:
    """The drift with its arguments in our order, for `calibrate`; along the deterministic flow of the drift alone."""

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return sde.f(torch.as_tensor(t, dtype=x.dtype, device=x.device), x)

    return drift
