"""Hosts whose state is alpha data + sigma noise on some path of their own, carried to the linear path and back.

Any such state, divided by alpha + sigma, lies on the linear path at t = sigma / (alpha + sigma), and whatever the
host's model predicts there is a velocity. So one profile serves all of these hosts, and a step of Euler in sigma, of
DDIM or of DPM-Solver-1 is a step of Euler: the linear path is where they agree.

Shapes: x, y (B, ...); alpha, sigma (B,) or ().
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sencache.batch import spread
from sencache.plugins.host import Calls
from sencache.trees import leaves

PREDICTIONS = ("data", "noise", "score", "v", "velocity")


def time_of(alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """The time on the linear path, float64, of the host's alpha and sigma."""
    alpha, sigma = (torch.as_tensor(value, device="cpu").detach().double() for value in (alpha, sigma))
    return torch.where(sigma.isinf(), 1.0, sigma / (alpha + sigma))


def inside(t: Tensor | float) -> Tensor:
    """t, (1,) float64, kept 1e-3 off pure data and pure noise, where a velocity is a difference over nothing."""
    return torch.as_tensor(t, dtype=torch.float64, device="cpu").detach().reshape(1).clamp(1e-3, 1 - 1e-3)


class Carrier:
    """Between what a host's model says of (x, alpha, sigma) and the velocity on the linear path, in float32 or better.

    prediction: what the model says: "data", "noise", "score" (of the host's own state), or "v" = alpha noise - sigma
        data of a host with alpha^2 + sigma^2 = 1, or "velocity" = noise - data itself.
    """

    def __init__(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float, prediction: str):
        if prediction not in PREDICTIONS:
            raise ValueError(f"A model predicts one of {', '.join(PREDICTIONS)}; got {prediction!r}.")
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        exact = (torch.as_tensor(value, device="cpu").detach().double() for value in (alpha, sigma))
        alpha, sigma = (value.expand(len(x)) for value in exact)
        self.t, self.prediction = time_of(alpha, sigma), prediction
        whole = alpha + sigma
        shares = (whole, alpha, sigma, alpha / whole, sigma / whole)
        self.whole, self.alpha, self.sigma, self.of_data, self.of_noise = (spread(share, wide) for share in shares)
        self.x = wide / self.whole  # of_data data + of_noise noise

    def velocity(self, y: Tensor) -> Tensor:
        """noise - data of the model's output y."""
        y = y.to(self.x.dtype)
        if self.prediction == "velocity":
            return y
        if self.prediction == "v":
            return self.whole * (y + (self.sigma - self.alpha) * self.x)
        if self.prediction == "data":
            return (self.x - y) / self.of_noise
        noise = y if self.prediction == "noise" else -self.sigma * y
        return (noise - self.x) / self.of_data

    def output(self, velocity: Tensor) -> Tensor:
        """What the model would have said where the velocity is this; the inverse of `velocity`, up to rounding."""
        if self.prediction == "velocity":
            return velocity
        data, noise = self.x - self.of_noise * velocity, self.x + self.of_data * velocity
        if self.prediction == "v":
            return self.alpha * noise - self.sigma * data
        return data if self.prediction == "data" else noise if self.prediction == "noise" else -noise / self.sigma


class Translated:
    """The calls of a host that speaks another language than the run: fresh outputs are handed on as they came."""

    def __init__(self, calls: Calls):
        self.calls = calls
        self.said: dict[int, Tensor] = {}  # of each conditioning, the last answer
        self.fresh: tuple[Tensor, Tensor] | None = None  # what the model said in this call, and as a velocity

    def ask(self, carrier: Carrier, model: Callable[[], Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The model's output at the carrier's (x, t), from `model()` or from memory."""
        self.fresh = None

        def evaluate() -> Tensor:
            y = model()
            self.fresh = y, carrier.velocity(y)
            return self.fresh[1]

        v = self.calls.ask(carrier.x, carrier.t, evaluate, *args, **kwargs)
        y = self.fresh[0] if self.fresh and v is self.fresh[1] else self._translated(v, carrier)
        self.fresh = None
        self._remember(y)
        return y

    def _remember(self, y: Tensor) -> None:
        known = {branch.number for _, branch in self.calls.run.branches.known} if self.calls.run else set()
        self.said = {number: said for number, said in self.said.items() if number in known}
        number = self.calls.report.trace[-1].branch
        if number in known:
            self.said[number] = y.detach().clone()

    def _translated(self, v: Tensor, carrier: Carrier) -> Tensor:
        """The output of the velocity v; without any rounding where it is the model's own, or was given before."""
        query, y = self.calls.report.trace[-1], carrier.output(v)
        if self.fresh:
            own, of_own = self.fresh
            evaluated = spread(~(query.reused | query.duplicate), y).bool()
            y = torch.where(evaluated, own + (y - carrier.output(of_own)), y)
        y = y.to(self.fresh[0].dtype if self.fresh else self.said[query.branch].dtype)
        if query.duplicate.any():
            y = torch.where(spread(query.duplicate, y).bool(), self.said[query.branch], y)
        return y

    def close(self) -> None:
        self.said = {}


def same_contents(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A `key` for hosts that make new conditioning tensors at every call: conditionings are told apart by contents."""
    return Contents([_kept(leaf) for leaf in leaves((args, dict(sorted(kwargs.items()))))])


def _kept(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


class Contents:
    """The leaves of a conditioning, equal to others where all their elements are."""

    def __init__(self, parts: list[Any]):
        self.parts = parts

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Contents) or len(self.parts) != len(other.parts):
            return False
        return all(_equal(*pair) for pair in zip(self.parts, other.parts, strict=True))

    __hash__ = None  # type: ignore[assignment]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return a is b or (type(a) is type(b) and bool(a == b))
