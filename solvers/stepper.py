"""What an integration method is to the loop: it knows one interval and nothing else.

Shapes: x, dx, v (B, ...); everything about time is 0-dim, in the grid's dtype.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from solvers.field import VelocityField


class Weights(NamedTuple):
    """How a step weighs what it is made of: x_next = state * x + field * v, with v the field's output at (x, t).

    Exact for steppers that are linear in one output (Euler, DDIM, Euler-Maruyama up to its noise). Where a step uses
    several outputs, `field` is the total weight they carry together.
    """

    state: Tensor  # ()
    field: Tensor  # ()


class Stepper(Protocol):
    """An integration method. It knows one interval; what it remembers between intervals is handed in and back."""

    @property
    def order(self) -> float:
        """Global order of convergence (strong order for an SDE)."""

    @property
    def adaptive(self) -> bool:
        """True where the method chooses its own evaluations inside the interval."""

    def weights(self, t: Tensor, t_next: Tensor) -> Weights:
        """The weights of the step from t to t_next."""

    def advance(self, field: VelocityField, x: Tensor, t: Tensor, t_next: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """dx over the interval, and the memory for the next one; `memory` is None in the first."""


class Step(NamedTuple):
    """What happened in one step; the x and t of the last one are the end of the trajectory."""

    x: Tensor  # (B, ...) the state after the step
    t: Tensor  # () its time
    dx: Tensor  # (B, ...) x minus the state before
    dt: Tensor  # () t minus the time before
    weights: Weights
