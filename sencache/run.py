"""SenCache, Algorithm 1 (arXiv 2602.24208): reuse a field's output while its predicted change stays small.

A `Run` is one trajectory under a `Rule`. For every conditioning it remembers each sample's last evaluation, and it is
itself a velocity field. Every sample decides for itself, or all of them together.

Shapes: x (B, ...); t float, (), (B,) or (B, T) with T tokens; what a decision is made of, (B,): NumPy's here, and
tensors on the host for who is asked.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from sencache.batch import Array, batch_of, clock_of, merge, take
from sencache.correct import Ledger, Note, beyond, observed, offset
from sencache.criteria import Gains
from sencache.memory import Branch, Branches, Key, Look, one_network
from sencache.norms import Norm, difference
from sencache.report import Query, Report
from sencache.reuse import Phi, Variable, continued
from sencache.trees import replace, tensors


class Criterion(Protocol):
    """How far has the output moved since it was evaluated? Sensitivities answer, a plan, or the outputs themselves.

    It is asked for the change of the output, in the output's units.
    """

    @property
    def direction(self) -> int:
        """The sign of dt it was made for; 0 for any."""

    def predicted(self, seen: Look) -> Tensor:
        """The predicted change (B,) float64 of a reuse now; infinite where nothing is known."""


@runtime_checkable
class Watching(Criterion, Protocol):
    """A criterion that looks at the queries themselves and has a memory of its own, a value for every conditioning."""

    def watch(self, x: Any, t: Tensor | float, *args: Any, **kwargs: Any) -> Any:
        """What it looks at in a query, a tree of tensors (B, ...): the `now` of the `Look` that it is handed."""

    def note(self, seen: Look, rows: Tensor, y: Any) -> Any:
        """What it wants to be handed as `noted` at the next query, a tree of tensors (B, ...).

        Asked once the samples `rows` (B,) bool have been evaluated, y being the outputs of these alone.
        """


@dataclass(frozen=True)
class Rule:
    """Algorithm 1's parameters, for one grid."""

    criterion: Criterion
    tolerance: Callable[[float], float]  # epsilon(t)
    max_reuses: float  # n
    phi: Phi  # what a reuse returns
    variable: Variable  # s(t), in which outputs are continued
    norm: Norm
    payload: str = "output"  # what is continued, or "blocks": what the block stack added, under a fresh head; or
    #                          "difference": of output and state, added to the state
    gains: Gains | None = None  # with them epsilon bounds what reuses since the last evaluation did to the sample
    together: bool = False  # whether all samples are evaluated as soon as one of them needs it

    @cached_property
    def watcher(self) -> Watching | None:
        """The criterion, if it is one that watches."""
        return self.criterion if isinstance(self.criterion, Watching) else None

    def spent(self, change: Tensor, seen: Look) -> Tensor:
        """What a reuse now is measured by (B,), beside the tolerance: its change, or the sum of gain times change."""
        return change if self.gains is None else seen.spent + self.gains.at(seen) * change

    def epsilon(self, t: Tensor) -> Array:
        """The tolerance at times t (B,), (B,) float64."""
        values = np.array([float(self.tolerance(at)) for at in t.tolist()])
        if not (values >= 0).all():
            raise ValueError(f"`tolerance` must be 0 or more at every t; got {values.tolist()} at {t.tolist()}.")
        return values


class Run:
    """One trajectory under a rule: a velocity field with a memory."""

    def __init__(self, field: Any, rule: Rule, key: Key | None):
        self.field, self.rule, self.report = field, rule, Report()
        self.branches = Branches(key)
        self.ledger: Ledger | None = None  # for a correction: where each query enters what it did
        self.sampler: tuple[Any, ...] = ()  # what is known of who asks, to begin anew with
        self.once = False  # whether another state at the first time is another trajectory's, and not a second stage's

    def __call__(self, x: Any, t: Tensor | float, *args: Any, **kwargs: Any) -> Any:
        """The field's output at (x, t), of each sample evaluated or from memory."""
        if _recorded((x, args, kwargs)):
            return self.bypass(self.field(x, t, *args, **kwargs), x, t)
        rule, watcher = self.rule, self.rule.watcher
        clock, branch = clock_of(t, batch_of(x)), self.branches.find(args, kwargs)
        regime = getattr(self.field, "regime", one_network)
        # Its `distance` and `elapsed` are Alg. 1's ||d|| and |tau|.
        seen = branch.look(x, clock, rule.norm, regime, self.once)
        if not branch.direction.all():
            check_direction(rule.criterion.direction, seen.step * torch.from_numpy(branch.direction == 0))
        if watcher:
            seen.now = watcher.watch(x, t, *args, **kwargs)

        predicted = rule.criterion.predicted(seen).detach().cpu().double()  # S, Eq. 9
        spent, epsilon = rule.spent(predicted, seen).numpy(), rule.epsilon(seen.t)
        small = (spent <= epsilon) & (abs(spent) < math.inf) & (epsilon > 0)  # Eq. 10; epsilon = 0 reuses nothing
        known, same, begun = seen.known.numpy(), seen.same.numpy(), seen.anew.numpy()
        anew = begun | seen.other.numpy()  # nothing known is of any use
        reused = small & (branch.reuses < rule.max_reuses) & known & ~anew & ~same  # Alg. 1: S <= eps and m < n
        if rule.together and not (reused | same).all():
            reused[:] = False
        needed = computed = ~(reused | same)
        every = needed.all()

        nodes = rule.variable(np.stack([each.numpy() for each in (seen.t, seen.t_ref, seen.t_before)], 1))
        s, s_ref, _ = nodes.T
        phi = np.zeros(len(clock)) if every else np.where(needed, 0.0, rule.phi(*nodes.T))
        y, earlier = None, (branch.y, branch.y_before)  # y_r, y_2
        owes = np.where(needed[:, None], 0.0, offset(s - s_ref, phi))
        if needed.any():
            # Alg. 1: y = f(x, t)
            (y, stack), computed = _evaluate(self.field, rule.payload, needed, x, t, args, kwargs)
            if not tensors(y):
                raise TypeError(
                    f"The field must return a tensor, or a tree of some; got {type(y).__name__} at t = {t}."
                )
            if _recorded(y):
                return self.bypass(y if every else self.field(x, t, *args, **kwargs), x, t)
            branch.keep(needed, x, clock, y, stack, anew, rule.norm)  # Alg. 1: the reference moves; m = 0
            self._observe(branch, needed, anew, nodes)
        if watcher:
            branch.noted = watcher.note(seen, torch.from_numpy(needed), y)
        branch.stand(x, clock, seen.step.numpy(), spent, reused)

        unknown = np.full(len(clock), math.nan)
        decided, paid, later = (torch.from_numpy(each) for each in (reused, computed, unknown))
        query = Query(seen.t, predicted, decided, seen.same, paid, branch.number, later, torch.from_numpy(spent))
        self.report.add(query, bool(begun.any()))
        if every:
            answer = y
        elif rule.payload == "output":
            answer = continued(branch.y, branch.y_before, phi)
            branch.open += [(unknown, reused, owes)] if reused.any() else []
        else:
            stack, fresh = continued(branch.stack, branch.stack_before, phi), branch.reuses == 0
            head = _state_plus if rule.payload == "difference" else self.field.head
            answer = merge(fresh, take(fresh, branch.y), head(x, t, stack, *args, **kwargs))
        if self.ledger is None:
            return answer
        excess = None
        if rule.payload != "output":  # y_r + phi (y_r - y_2) is not what was used
            excess, owes = beyond(answer, earlier[0], needed), owes * [1, 1, 0]
        note = Note(owes, excess, needed, nodes, (branch.y, *earlier), anew, same, branch.number)
        return self.ledger.enter(answer, note, seen.t.numpy())

    def _observe(self, branch: Branch, rows: Array, anew: Array, nodes: Array) -> None:
        """Enter in the record how far off the reuses were of the samples `rows` (B,), now that these are evaluated.

        Of a sample that is `anew` (B,) it will never be known.
        """
        if not branch.open:
            return
        errors = observed(np.array([owes for _, _, owes in branch.open]), nodes, branch.apart)
        still = []
        for (record, left, owes), error in zip(branch.open, errors, strict=True):
            np.copyto(record, error, where=rows & left & ~anew)
            if (left & ~rows).any():
                still.append((record, left & ~rows, owes))
        branch.open = still

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
        at = torch.from_numpy(clock_of(t, len(tensors(x)[0])))[:, 0]
        none = np.zeros(len(at), dtype=bool)
        if self.ledger is not None:
            nodes = np.full((len(at), 3), math.nan)
            excess = beyond(y, None, ~none) if self.rule.payload != "output" else None
            note = Note(np.zeros_like(nodes), excess, none, nodes, (y, y, y), ~none, none, 0)
            y = self.ledger.enter(y, note, at.numpy())
        self.report.bypasses += 1
        infinite, no = torch.full_like(at, math.inf), torch.from_numpy(none)
        self.report.add(Query(at, infinite, no, no, ~no, 0, torch.full_like(at, math.nan), infinite), False)
        return y


def _recorded(tree: Any) -> bool:
    """Whether autograd is watching any tensor here."""
    return torch.is_grad_enabled() and any(part.requires_grad for part in tensors(tree))


def _evaluate(
    field: Any,
    payload: str,
    needed: Array,
    x: Any,
    t: Tensor | float,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, Any], Array]:
    """Output and stack of the samples `needed` (B,) bool, and which samples (B,) were computed for it."""

    def both(field: Any, x: Any, t: Tensor | float) -> tuple[Any, Any]:
        if payload != "blocks":
            y = field(x, t, *args, **kwargs)
            return y, None if payload == "output" else _less_state(y, x)
        stack = field.stack(x, t, *args, **kwargs)
        return field.head(x, t, stack, *args, **kwargs), stack

    if needed.all() or not hasattr(field, "select"):
        y, stack = both(field, x, t)
        for part in tensors(y):
            if not part.ndim or len(part) != len(needed):
                came = tuple(part.shape)
                raise ValueError(f"The field must return an output a sample, shape ({len(needed)}, ...); got {came}.")
        return take(needed, (y, stack)), np.ones_like(needed)
    own_times = isinstance(t, Tensor) and t.ndim > 0 and len(t) == len(needed)
    few, count = field.select(torch.from_numpy(needed.nonzero()[0])), int(needed.sum())
    y, stack = both(few, take(needed, x), take(needed, t) if own_times else t)
    wrong = [tuple(part.shape) for part in tensors(y) if len(part) != count]
    if wrong:
        raise ValueError(f"`select` was asked for the field of {count} samples, and that returned shape {wrong[0]}.")
    return (y, stack), needed


def _less_state(y: Any, x: Any) -> Any:
    """Output minus state, trees of the same tensors (B, ...), in float32 or better."""
    return replace(y, [difference(*pair) for pair in zip(tensors(y), tensors(x), strict=True)])


def _state_plus(x: Any, t: Tensor | float, less: Any, *args: Any, **kwargs: Any) -> Any:
    """The output that `_less_state` was made of, at another state."""
    pairs = zip(tensors(x), tensors(less), strict=True)
    return replace(less, [(part.to(rest.dtype) + rest).to(part.dtype) for part, rest in pairs])


def check_direction(direction: int, step: Tensor) -> None:
    """Raise where the sign of a first step in time (0 is no step) is against `direction` (0 is any)."""
    if (step * direction < 0).any():
        ways = {1: "rising", -1: "falling"}
        raise ValueError(
            f"The profile, plan or criterion was measured with t {ways[direction]}, and here t is {ways[-direction]}: "
            "another time convention, in which what it knows belongs to other times. Calibrate in this one."
        )
