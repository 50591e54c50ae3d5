"""flow_matching (Lipman et al. 2024): its `ODESolver` calls `velocity_model(x=x, t=t, **extras)`, t 0-dim, noise at 0.

    with flow_matching.wrap(velocity_model, profile, ts, method="euler", nfe=20) as model:
        ODESolver(model).sample(x_init=x_0, time_grid=ts, method="euler", step_size=None)

What is cached is the velocity. The solver is torchdiffeq's, and so are the methods. A profile measured in the papers'
time, noise at 1, is mirrored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sencache.plugins.host import Method, calling
from sencache.plugins.hosted import Hosted, HostedModule, hosted
from sencache.plugins.torchdiffeq import METHODS, REFUSED
from sencache.profile import SensitivityProfile
from solvers import VelocityField


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
    """The velocity model for one trajectory over ts (K + 1,), rising; options are `CachedField`'s."""
    with calling(model, profile, ts, method, METHODS, REFUSED, mirror=True, force=force, **options) as calls:

        def velocity(x: Tensor, t: Tensor, **extras: Any) -> Tensor:
            return calls.ask(x, t, lambda: model(x=x, t=t, **extras), **extras)

        yield hosted(model, calls, velocity)


def field(model: Callable[..., Tensor], **extras: Any) -> VelocityField:
    """The velocity model with positional arguments and its extras, for `calibrate`."""
    return lambda x, t: model(x=x, t=t, **extras)
