"""The one protocol everything else is written against: a velocity field v = field(x, t)."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class VelocityField(Protocol):
    """The right-hand side of dx/dt = v(x, t): any callable of a state and a time.

    x: (B, ...), one state a sample.
    t: in the field's own unit and direction. Our steppers hand it over as a 0-dim tensor in the grid's dtype, or as
       (B,) where samples stand at different times; a bare float is as good.
    Returns v: (B, ...), of x's shape and dtype, in units of x per unit of t.
    """

    def __call__(self, x: Tensor, t: Tensor, /) -> Tensor: ...
