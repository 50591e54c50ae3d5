"""What a stepper makes of each output it is given: in the final state, and in the states that it asks about on the way.

A stepper is linear in the outputs, so it is run on outputs that are unit vectors. For Euler's method both are the same,
because what a step adds stays as it is. A multistep solver weighs its last outputs otherwise in the state that it asks
about next than in the end: UniPC nearly twice, and near an end of the grid several times, or with the other sign.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sencache.linear import check_linear
from solvers import Stepper, VelocityField

NOTHING = 1e-9  # of what was 1, but for rounding


class Response(NamedTuple):
    """A stepper's on one grid, of T query times. Several queries at one time count as one output."""

    times: Tensor  # (T,) float64
    gain: Tensor  # (T,) dx_K / dv_j, how the final state weighs the output at each time
    states: Tensor  # (T, T) how the state that query k is asked in weighs it, in units of the end
    counts: Tensor  # (T,) int64, how many queries there are at each time

    @property
    def mixed(self) -> bool:
        """Whether a state on the way weighs outputs otherwise than the end: of a method with a history, or stages."""
        return not torch.allclose(self.states, self.gain.expand_as(self.states).tril(-1))


def response(stepper: Stepper, ts: Tensor) -> Response:
    """What a stepper makes of outputs on ts (K + 1,), run on unit vectors. Raises ValueError if it is not linear."""
    check_linear(stepper, ts)
    linear, ts, asked = getattr(stepper, "linear", stepper), ts.double().cpu(), _asked(stepper, ts)
    times = list(dict.fromkeys(asked))
    start = torch.eye(len(times) + 1, dtype=torch.float64, device="cpu")[-1:]  # beside them one that is there already
    unit, first = torch.eye(len(times), len(times) + 1, dtype=torch.float64, device="cpu"), dict[float, Tensor]()
    queries = iter(asked)

    def answer(x: Tensor, t: Tensor) -> Tensor:
        first.setdefault(time := next(queries), x[0].clone())
        return unit[times.index(time)].expand_as(x)

    end = _linear_end(linear, answer, ts, start)[0]
    states, gain = torch.stack([first[t] for t in times]), end[:-1]
    counts = ts.new_tensor([asked.count(t) for t in times]).long()
    return Response(ts.new_tensor(times), gain, _in_the_end(states[:, :-1], states[:, -1], end[-1], gain), counts)


def _in_the_end(states: Tensor, still: Tensor, end: Tensor, gain: Tensor) -> Tensor:
    """How states (T, T) weigh outputs, in units of the end.

    still, end: how far each state (T,), and the final one, is moved by a change of 1 in the first one. Where that is
    nothing, states are taken to weigh outputs as the end does.
    """
    lost = (still.abs() < NOTHING) | (end.abs() < NOTHING)
    return torch.where(lost[:, None], gain.expand_as(states).tril(-1), states * (end / still)[:, None])


def influence(stepper: Stepper, ts: Tensor) -> tuple[Tensor, Tensor]:
    """The query times (T,) of a stepper on ts (K + 1,), and dx_K / dv_j (T,): how it weighs each output in the end.

    Raises ValueError for a stepper that is not linear.
    """
    return response(stepper, ts)[:2]


def charges(stepper: Stepper, ts: Tensor) -> tuple[Tensor, Tensor]:
    """The query times (T,) and what each query there is charged, (T,): `influence`, shared by those at one time."""
    times, gain, _, counts = response(stepper, ts)
    return times, gain / counts


def _asked(stepper: Stepper, ts: Tensor) -> list[float]:
    """The time of every query of a stepper on ts (K + 1,), in order."""
    asked: list[float] = []

    def count(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t))
        return torch.zeros_like(x)

    nothing = torch.zeros(1, 1, dtype=torch.float64, device="cpu")
    _linear_end(getattr(stepper, "linear", stepper), count, ts.double().cpu(), nothing)
    return asked


def _linear_end(stepper: Stepper, field: VelocityField, ts: Tensor, x: Tensor) -> Tensor:
    memory = None
    for t, t_next in pairwise(ts):
        dx, memory = stepper.advance(field, x, t, t_next, memory)
        x = x + dx
    return x
