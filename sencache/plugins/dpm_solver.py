"""DPM-Solver (Lu et al. 2022), the authors' code: it calls `model_fn(x, t (B,))` for the noise in x.

    with dpm_solver.wrap(model_fn, profile, ts, schedule=noise_schedule, method="multistep 1", nfe=20) as cached:
        DPM_Solver(cached, noise_schedule).sample(x, steps=len(ts) - 1, order=1, method="multistep")

What is cached is the velocity on the linear path, at x / (alpha + sigma) and t = sigma / (alpha + sigma). The network
below `model_wrapper` can be wrapped too, `net(x, t, cond)` with labels t in 0..999: its conditioning comes in new
tensors at every call, and is told apart by contents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sencache.batch import spread
from sencache.plugins.gaussian import Carrier, Translated, inside, same_contents, time_of
from sencache.plugins.host import ADAPTIVE, Method, calling
from sencache.plugins.hosted import Hosted, HostedModule, hosted
from sencache.profile import SensitivityProfile
from solvers import DPMSolverPP, Euler, Linear, Stepper, VelocityField

METHODS: dict[str, Stepper] = {
    "multistep 1": Euler(),
    "singlestep 1": Euler(),
    "multistep 2": DPMSolverPP(Linear()),
    "multistep 3": DPMSolverPP(Linear()),
}
REFUSED = {"adaptive": ADAPTIVE}
PREDICTIONS = {"noise": "noise", "x_start": "data", "v": "v", "score": "score"}  # the authors' names


@contextmanager
def wrap(
    model: Callable[..., Tensor],
    profile: SensitivityProfile | None,
    ts: Tensor,
    *,
    schedule: Any,
    method: Method = "multistep 1",
    model_type: str = "noise",
    labels: bool = False,
    force: bool = False,
    **options: Any,
) -> Iterator[Hosted | HostedModule]:
    """The model for one trajectory over ts (K + 1,), the solver's own continuous times, falling.

    schedule: the `NoiseScheduleVP` (anything with `marginal_alpha` and `marginal_std`, and `total_N` for labels).
    method: the solver's method and order, "multistep 1" or "singlestep 1" (DDIM), whose steps are corrected,
        "multistep 2", "multistep 3"; None for any other. "adaptive" is refused.
    labels: t are the network's labels of a discrete schedule. model_type: what the model predicts, by the name that
        `model_wrapper` has for it; a `model_fn` that it made predicts noise. Further options are `CachedField`'s.
    """
    options.setdefault("key", same_contents)  # guidance, outside of the network, mixes its answers: not checked
    with calling(
        model, profile, times(ts, schedule), method, METHODS, REFUSED, unchecked=labels, force=force, **options
    ) as calls:
        translated = Translated(calls)

        def predicted(x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            at = t.reshape(-1) / 1000 + 1 / schedule.total_N if labels else t.reshape(-1)
            alpha, sigma = schedule.marginal_alpha(at), schedule.marginal_std(at)
            carrier = Carrier(x, alpha, sigma, PREDICTIONS[model_type])
            return translated.ask(carrier, lambda: model(x, t, *args, **kwargs), *args, **kwargs)

        try:
            yield hosted(model, calls, predicted)
        finally:
            translated.close()


def times(ts: Tensor, schedule: Any) -> Tensor:
    """The grid (K + 1,) on the linear path, float64, of the solver's times ts (K + 1,)."""
    return time_of(schedule.marginal_alpha(ts), schedule.marginal_std(ts))


def field(model_fn: Callable[..., Tensor], schedule: Any, *args: Any) -> VelocityField:
    """The velocity on the linear path of a noise-predicting model_fn, for `calibrate`.

    It starts from ``x / (alpha + sigma)`` on ``times(ts, schedule)``.
    """

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        at = inside(t)
        inner = schedule.inverse_lambda(((1 - at) / at).log().to(x)).expand(len(x))
        alpha, sigma = schedule.marginal_alpha(inner), schedule.marginal_std(inner)
        wide = x * spread(alpha + sigma, x)
        return Carrier(wide, alpha, sigma, "noise").velocity(model_fn(wide, inner, *args)).to(x)

    return velocity
