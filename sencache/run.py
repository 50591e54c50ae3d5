"""SenCache, Algorithm 1 (arXiv 2602.24208): reuse a field's output while its predicted change stays small.

A `Run` is one trajectory under a `Rule`. For every conditioning it remembers each sample's last evaluation, and it is
itself a velocity field. Every sample decides for itself.

Shapes: x (B, ...); t float, (), (B,) or (B, T) with T tokens; what a decision is made of, (B,) on the host.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sencache.correct import Ledger, Note, offset
from sencache.memory import Branches, Key, Look, batch_of, clock_of, take
from sencache.norms import Norm
from sencache.report import Query, Report
from sencache.reuse import Phi, Variable
from sencache.trees import tensors


class Criterion(Protocol):
    """How far has the output moved since it was evaluated? Sensitivities answer, a plan, or the outputs themselves."""

    @property
    def direction(self) -> int:
        """The sign of dt it was made for; 0 for any."""

    def predicted(self, seen: Look) -> Tensor:
        """The predicted change (B,) float64 of a reuse now; infinite where nothing is known."""


@dataclass(frozen=True)
class Rule:
    """Algorithm 1's parameters, for one grid."""

    criterion: Criterion
    tolerance: Callable[[float], float]  # epsilon(t)
    max_reuses: float  # n
    phi: Phi  # what a reuse returns
    variable: Variable  # s(t), in which outputs are continued
    norm: Norm

    def epsilon(self, t: Tensor) -> Tensor:
        """The tolerance at times t (B,), (B,) float64."""
        values = torch.tensor([float(self.tolerance(at)) for at in t.tolist()], dtype=torch.float64)
        if not (values >= 0).all():
            raise ValueError(f"`tolerance` must be 0 or more at every t; got {values.tolist()} at {t.tolist()}.")
        return values


class Run:
    """One trajectory under a rule: a velocity field with a memory."""

    def __init__(self, field: Callable[..., Any], rule: Rule, key: Key | None):
        self.field, self.rule, self.report = field, rule, Report()
        self.branches = Branches(key)
        self.ledger: Ledger | None = None  # for a correction: where each query enters what it did
        self.sampler: tuple[Any, ...] = ()  # what is known of who asks, to begin anew with

    def __call__(self, x: Any, t: Tensor | float, *args: Any, **kwargs: Any) -> Any:
        """The field's output at (x, t), of each sample evaluated or from memory."""
        if _recorded((x, args, kwargs)):
            return self.bypass(self.field(x, t, *args, **kwargs), x, t)
        rule, clock, branch = self.rule, clock_of(t, batch_of(x)), self.branches.find(args, kwargs)
        seen = branch.look(x, clock, rule.norm)  # ||d||, |tau|: the sums of dx and dt since the reference telescope
        check_direction(rule.criterion.direction, seen.step * (branch.direction == 0))

        predicted, epsilon = rule.criterion.predicted(seen), rule.epsilon(seen.t)  # S, Eq. 9
        small = (predicted <= epsilon) & predicted.isfinite() & (epsilon > 0)  # Eq. 10; epsilon = 0 reuses nothing
        reused = small & (branch.reuses < rule.max_reuses) & ~seen.anew & ~seen.same  # Alg. 1: S <= eps and m < n
        needed = computed = ~(reused | seen.same)

        s, s_ref, s_before = (rule.variable(at) for at in (seen.t, seen.t_ref, seen.t_before))
        phi = rule.phi(s, s_ref, s_before.where(seen.difference.isfinite(), torch.nan)).masked_fill(needed, 0)
        earlier = branch.y, branch.y_before  # y_r, y_2
        if needed.any():
            y, computed = _evaluate(self.field, needed, x, t, args, kwargs)  # Alg. 1: y = f(x, t)
            if _recorded(y):
                return self.bypass(y if needed.all() else self.field(x, t, *args, **kwargs), x, t)
            branch.keep(needed, x, clock, y, seen.anew, rule.norm)  # Alg. 1: the reference moves; m = 0
        branch.stand(x, clock, seen.step, predicted, reused)

        self.report.add(Query(seen.t, predicted, reused, seen.same, computed, branch.number), seen.anew)
        answer = y if needed.all() else branch.answer(phi)
        if self.ledger is None:
            return answer
        nodes = torch.stack([s, s_ref, s_before], 1)
        owes, outputs = offset(s - s_ref, phi) * ~needed[:, None], (branch.y, *earlier)
        note = Note(owes, needed, nodes, outputs, seen.anew, seen.same, branch.number)
        return self.ledger.enter(answer, note, seen.t)

    def forget(self) -> None:
        """Drop every tensor that is held; the report stays."""
        self.branches.clear()
        self.ledger = None

    def bypass(self, y: Any, x: Any, t: Tensor | float) -> Any:
        """Hand out y with its gradients and keep nothing: a reused output would make them silently wrong."""
        warnings.warn(
            "Gradients are being recorded, so every call is evaluated and nothing is reused. To sample, call under "
            "`torch.no_grad()`, or freeze the model with `requires_grad_(False)`.",
            stacklevel=4,
        )
        self.branches.clear()
        t = clock_of(t, len(tensors(x)[0]))[:, 0]
        none = torch.zeros_like(t, dtype=torch.bool)
        if self.ledger is not None:
            nodes = torch.full((len(t), 3), math.nan, dtype=torch.float64)
            y = self.ledger.enter(y, Note(torch.zeros_like(nodes), none, nodes, (y, y, y), ~none, none, 0), t)
        self.report.bypasses += 1
        self.report.add(Query(t, torch.full_like(t, math.inf), none, none, ~none, 0), none)
        return y


def _recorded(tree: Any) -> bool:
    """Whether autograd is watching any tensor here."""
    return torch.is_grad_enabled() and any(part.requires_grad for part in tensors(tree))


def _evaluate(
    field: Any, needed: Tensor, x: Any, t: Tensor | float, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Tensor]:
    """The field's output for the samples `needed` (B,) bool, and which samples (B,) were computed for it."""
    if needed.all():
        return field(x, t, *args, **kwargs), needed
    if not hasattr(field, "select"):
        return take(needed, field(x, t, *args, **kwargs)), torch.ones_like(needed)
    own_times = isinstance(t, Tensor) and t.ndim > 0 and len(t) == len(needed)
    few = field.select(needed.nonzero()[:, 0])
    return few(take(needed, x), take(needed, t) if own_times else t, *args, **kwargs), needed


def check_direction(direction: int, step: Tensor) -> None:
    """Raise where the sign of a first step in time (0 is no step) is against `direction` (0 is any)."""
    if (step * direction < 0).any():
        ways = {1: "rising", -1: "falling"}
        raise ValueError(
            f"The profile was measured with t {ways[direction]}, and here t is {ways[-direction]}: another time "
            "convention, in which its sensitivities belong to other times. Calibrate in this one."
        )
