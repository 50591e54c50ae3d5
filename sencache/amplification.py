"""What the field makes of an error on its way to the end, which differs from sample to sample far more than errors do.

Beside the full run an error d is carried along: in every step it becomes what the stepper's weights make of it and of
f(x + d, t) - f(x, t), and then gets a push along the way in which the outputs bend, as reuses give it. What it becomes
before the push says step by step how errors grow. Plans of a rehearsed profile weigh what a gap leaves by what that
comes to in the end, for samples in which it is much.

Shapes: S samples, K steps; T query times, as many as steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from sencache.batch import Array
from sencache.norms import difference, rms
from solvers import Stepper, VelocityField, Weights, integrate

MOST = 1e4  # times larger is as much as plans take an error to become: more would drown all others in rounding


def run_amplified(field: VelocityField, x: Tensor, ts: Tensor, stepper: Stepper) -> tuple[Tensor, Tensor]:
    """The full run's end (S, ...) from x (S, ...), and how many times larger an error made in step k is there, (S, K).

    Beyond what the stepper itself makes of it, as its weights say. Steps of which that could not be measured count as
    1: the first ones, before outputs bend, and those after which an error is no number. Pays for two full runs, less
    three steps.
    """
    both = _Beside(field, stepper)
    end = integrate(field, x, ts, both)
    rates = torch.stack(both.rates, 1)
    rates = torch.where(rates.isfinite() & (rates > 0), rates, 1.0)
    later = rates[:, 1:].flip(1).cumprod(1).flip(1)
    return end, torch.cat([later, torch.ones_like(rates[:, :1])], 1)


def carried(amplified: Tensor | None) -> Array:
    """How plans weigh what outputs leave wrong, (T,), by what errors became in a rehearsal, (S, T), if there was one.

    By what one sample in twenty exceeds, of a log-normal distribution with the mean and the spread of these, because
    a promise to nine of ten is lost by such samples, and few samples show none. What makes errors smaller counts as 1:
    it is of this one way to err.
    """
    if amplified is None:
        return np.ones(1)
    logs = amplified.double().clamp(1, MOST).log()
    spread = logs.std(0, correction=min(1, len(logs) - 1))
    return np.asarray((logs.mean(0) + ndtri(0.95) * spread).exp().clamp(1, MOST).numpy())


class _Beside:
    """A stepper that carries an error beside the run that it is asked to step, and `rates` of how it grows."""

    adaptive = False

    def __init__(self, field: VelocityField, stepper: Stepper):
        self.field, self.stepper, self.order = field, stepper, stepper.order
        self.rates: list[Tensor] = []  # (S,) of each step
        self.outputs: list[Tensor] = []  # the last three, (S, ...)
        self.error: Tensor | None = None  # (S, ...)

    def weights(self, t: Tensor, t_next: Tensor) -> Weights:
        return self.stepper.weights(t, t_next)

    def advance(self, field: VelocityField, x: Tensor, t: Tensor, t_next: Tensor, memory: Any) -> tuple[Tensor, Any]:
        asked: list[tuple[Tensor, Tensor]] = []

        def kept(x: Tensor, t: Tensor) -> Tensor:
            v = field(x, t)
            self.outputs = [*self.outputs[-2:], v.clone()]
            asked.append((x, t))
            return v

        dx, memory = self.stepper.advance(kept, x, t, t_next, memory)
        state, weight = (float(each) for each in self.weights(t, t_next))
        if self.error is None:
            self.rates.append(torch.full((len(x),), torch.nan, dtype=torch.float64, device="cpu"))
        else:
            moved = state * self.error + weight * self._answer(*asked[-1])
            rate = (rms(moved) / rms(self.error)).double() / abs(state)
            self.rates.append(rate.cpu())
            self.error = torch.where(rate.isfinite().reshape(_column(x)), moved, 0.0)  # what is lost begins anew
        if len(self.outputs) == 3:
            push = self._bend() * abs(weight)
            self.error = push if self.error is None else self.error + push
        return dx, memory

    def _answer(self, x: Tensor, t: Tensor) -> Tensor:
        """What the output at (x, t) changes by with the error in the state, from one a hundredth of the state's size.

        Or as many times its precision as can be told from rounding.
        """
        assert self.error is not None
        share = max(0.01, 16 * torch.finfo(x.dtype).eps)
        scale = _known(rms(self.error) / rms(x)) / share  # (S,)
        off = x + (self.error * _known(1 / scale).reshape(_column(x))).to(x)
        answer = difference(self.field(off, t), self.outputs[-1])
        actual = rms(difference(off, x))
        return answer * _known(rms(self.error) / actual).reshape(_column(x))

    def _bend(self) -> Tensor:
        """The second difference (S, ...) of the last outputs, as long as the last of them."""
        before, middle, last = self.outputs
        bend = difference(last, middle) - difference(middle, before)
        return bend * _known(rms(last) / rms(bend)).reshape(_column(bend))


def _known(ratio: Tensor) -> Tensor:
    return torch.where(ratio.isfinite(), ratio, 0.0)


def _column(x: Tensor) -> tuple[int, ...]:
    return -1, *[1] * (x.ndim - 1)
