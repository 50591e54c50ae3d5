"""torchdiffeq (Chen 2018): `odeint(func, y0, t)` calls `func(t, y)`, with t 0-dim and y a tensor or a tuple of them.

    with torchdiffeq.wrap(func, profile, ts, method="euler", nfe=20) as cached:
        odeint(cached, x_T, ts, method="euler")

What is cached is what func returns. Gradients, through `odeint` or `odeint_adjoint`, are those of the bare func: where
they are recorded, or func has parameters that want them, everything is evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sencache.plugins.host import ADAPTIVE, IMPLICIT, Method, calling
from sencache.plugins.hosted import Hosted, HostedModule, hosted
from sencache.profile import SensitivityProfile
from solvers import Euler, Stepper, TorchDiffEq, VelocityField

METHODS: dict[str, Stepper] = {"euler": Euler()} | {
    name: TorchDiffEq(name) for name in ("midpoint", "heun2", "heun3", "rk4")
}
REFUSED = dict.fromkeys(("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver"), ADAPTIVE)
REFUSED |= dict.fromkeys(("implicit_adams", "fixed_adams"), IMPLICIT)
REFUSED["explicit_adams"] = "weighs its last outputs with large alternating weights, which amplify any error of a reuse"


@contextmanager
def wrap(
    func: Callable[..., Any],
    profile: SensitivityProfile | None,
    ts: Tensor,
    *,
    method: Method = "euler",
    force: bool = False,
    **options: Any,
) -> Iterator[Hosted | HostedModule]:
    """func for one trajectory over ts (K + 1,), the times at which the solver steps.

    method: the one that `odeint` is told: "euler", whose steps are corrected, "midpoint", "heun2", "heun3", "rk4";
        None for any other of fixed steps. Adaptive, implicit and Adams ones are refused. Options are `CachedField`'s.
    """
    with calling(func, profile, ts, method, METHODS, REFUSED, adjoint=True, force=force, **options) as calls:
        yield hosted(func, calls, lambda t, y: calls.ask(y, t, lambda: func(t, y)))


def field(func: Callable[..., Any]) -> VelocityField:
    """func with its arguments in our order, for `calibrate`."""
    return lambda x, t: func(t, x)
