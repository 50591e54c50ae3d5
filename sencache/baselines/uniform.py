"""Evaluations spread evenly over the steps of a grid, ts (K + 1,), whatever the field does."""

from __future__ import annotations

import torch
from torch import Tensor

from sencache.criteria import Scheduled
from sencache.influence import influence
from solvers import Euler, Stepper

EULER = Euler()


def uniform(ts: Tensor, nfe: int, stepper: Stepper = EULER, *, last: bool = False) -> Scheduled:
    """`nfe` of the T outputs that the stepper asks for on ts (K + 1,), at equal intervals, the first among them.

    last: the last among them too.
    """
    times = influence(stepper, ts)[0]
    if not 1 <= nfe <= len(times):
        raise ValueError(f"`nfe` must be 1 to {len(times)}, the outputs that {stepper} asks for here; got {nfe}.")
    at = torch.linspace(0, len(times) - last, nfe + (not last), dtype=torch.float64, device="cpu")[:nfe]
    return Scheduled(times, at.round().long())


def every(ts: Tensor, k: int, stepper: Stepper = EULER) -> Scheduled:
    """Every k-th of the outputs that the stepper asks for on ts (K + 1,), from the first on."""
    times = influence(stepper, ts)[0]
    if k < 1:
        raise ValueError(f"`k` counts outputs from one evaluation to the next, 1, 2, ...; got {k}.")
    return Scheduled(times, torch.arange(0, len(times), k, device="cpu"))
