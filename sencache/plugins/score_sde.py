"""score_sde (Song et al. 2021): its samplers call `model(x, labels (B,))` and make the score of what it says.

    with score_sde.wrap(model, profile, ts, sde=sde, nfe=200) as cached:
        sampling_fn(cached)

What is cached is the velocity on the linear path, at x / (alpha + sigma) and t = sigma / (alpha + sigma), alpha and
sigma being the sde's. Its predictors and correctors add noise or ask twice at one time: nothing is corrected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sencache.plugins.gaussian import Carrier, Translated, time_of
from sencache.plugins.host import ADAPTIVE, Method, calling
from sencache.plugins.hosted import Hosted, HostedModule, hosted
from sencache.profile import SensitivityProfile
from solvers import Euler, Stepper


class Noisy(Euler):
    """Whatever a predictor does with an output, and noise beside it, of which plans should know."""

    noise = None


METHODS: dict[str, Stepper] = {"pc": Noisy()}
REFUSED = {"ode": ADAPTIVE}
LABELS = ("continuous", "discrete", "time")


@contextmanager
def wrap(
    model: Callable[..., Tensor],
    profile: SensitivityProfile | None,
    ts: Tensor,
    *,
    sde: Any,
    method: Method = "pc",
    labels: str = "continuous",
    force: bool = False,
    **options: Any,
) -> Iterator[Hosted | HostedModule]:
    """The model for one trajectory that asks at ts (K,), the sde's own times, falling.

    sde: anything with `marginal_prob(x, t)`; with a `sigma_max` it is a VE SDE, whose models predict the score, else
        the models predict noise, and `get_score_fn` divides.
    method: "pc", every predictor and corrector that asks at ts alone. "ode", SciPy's adaptive solver, is refused.
    labels: as in `get_score_fn`, "continuous" or "discrete"; "time" where what is wrapped is a `score_fn(x, t)` itself.
        Further options are `CachedField`'s.
    """
    if labels not in LABELS:
        raise ValueError(f"`labels` must be one of {', '.join(LABELS)}; got {labels!r}.")
    variance_exploding = hasattr(sde, "sigma_max")
    prediction = "score" if variance_exploding or labels == "time" else "noise"

    def shares(x: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """alpha, sigma (B,)."""
        if variance_exploding and labels == "continuous":
            return torch.ones_like(label), label
        if labels == "time":
            return marginal(sde, label)
        last = 999 if labels == "continuous" else sde.N - 1
        t = label.double() / last
        return marginal(sde, sde.T - t if variance_exploding else t)

    options.setdefault("correct", False)
    known = times(ts, sde)
    grid = torch.cat([known, known.new_zeros(1)])  # a step from the last time to the data
    with calling(model, profile, grid, method, METHODS, REFUSED, force=force, **options) as calls:
        translated = Translated(calls)

        def said(x: Tensor, label: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            carrier = Carrier(x, *shares(x, label), prediction)
            return translated.ask(carrier, lambda: model(x, label, *args, **kwargs), *args, **kwargs)

        try:
            yield hosted(model, calls, said)
        finally:
            translated.close()


def marginal(sde: Any, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha, sigma (B,) of the sde's marginals at t (B,)."""
    mean, std = sde.marginal_prob(torch.ones(len(t), 1, 1, 1, dtype=t.dtype, device=t.device), t)
    return mean[:, 0, 0, 0], std


def times(ts: Tensor, sde: Any) -> Tensor:
    """The sde's times ts (K,) on the linear path, float64."""
    return time_of(*marginal(sde, ts))
