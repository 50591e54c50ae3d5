"""What a run remembers: for every conditioning, each sample's last evaluation and where the last query stood.

Shapes: x, y trees of tensors (B, ...); a clock is (B, T) float64, T = 1 unless tokens have times of their own. What is
known of each sample is NumPy's, quick where there are few numbers; criteria are shown it as tensors. Everything kept is
a detached copy, and nothing kept is ever handed out: samplers write in place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from operator import eq
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sencache.batch import Array, apart, copy, finiteness, kind, merge, take
from sencache.norms import Norm
from sencache.trees import leaves, tensors

Key = Callable[[tuple[Any, ...], dict[str, Any]], Any]
Regime = Callable[[Tensor], Tensor]  # which network answers at times t: of t's shape, equal where it is the same one
MOST_BRANCHES = 8


@dataclass(eq=False)
class Look:
    """A query seen from memory: (B,) each, tensors on the host."""

    t: Tensor  # float64, where the sampler stands; of several tokens, the one that moved most
    t_ref: Tensor  # float64, where the last evaluation was
    t_before: Tensor  # float64, where the one before it was; NaN where there is none, or either was not finite
    difference: Tensor  # float64, norm of the last evaluation minus the one before it; infinite where there is none
    since: Tensor  # float64, |t - t of the query before|
    spent: Tensor  # float64, what the query before was measured by, 0 if that was an evaluation
    step: Tensor  # float64, the sign of t's move since the query before
    known: Tensor  # bool, there is an evaluation, and it was finite
    same: Tensor  # bool, x and t are exactly those of the query before
    anew: Tensor  # bool, another trajectory has begun: t ran backwards, or x is of another shape, dtype or device, or,
    #               where nothing is known of who asks, another x at the first t
    other: Tensor  # bool, another network answers here than at the last evaluation
    x: Any  # the query's state, a tree of (B, ...),
    norm: Norm  # and how it is measured
    branch: int  # which conditioning asks, in the order of appearance
    reference: tuple[Any, Any] | None = None  # x_ref and the output there, trees of (B, ...); None where there is none
    noted: Any = None  # what a `Watching` criterion noted down at the query before; None if there was none,
    now: Any = None  # and what it watches at this one

    @property
    def elapsed(self) -> Tensor:
        """|t - t_ref|, float64."""
        return (self.t - self.t_ref).abs()

    @cached_property
    def distance(self) -> Tensor:
        """The norm of x - x_ref, float64; infinite where nothing is known. The device is waited for if it is asked."""
        if self.reference is None:
            return torch.full_like(self.t, torch.inf)
        return apart(self.x, self.reference[0], self.norm).cpu().where(self.known, torch.inf)


class Branch:
    """The memory of one conditioning, from its first evaluation on."""

    x: Any  # the references: where each sample was last evaluated,
    t: Array  # (B, T) when,
    y: Any  # and what came out,
    stack: Any  # by way of what the blocks added, where that is reused instead of y; else None
    finite: Array  # (B,) bool, whether y can be reused at all
    t_before: Array  # (B, T) when the evaluation before was; NaN where there is none, or no line through both,
    y_before: Any  # and what came out,
    stack_before: Any  # by way of
    apart: Array  # (B, 3) norms, of samples just evaluated: y - y_before, what that was at the evaluation before, and,
    #               where reuses are open, y less the earliest of the three outputs
    spent: Array  # (B,) float64, what the last query was measured by, 0 if that was an evaluation
    reuses: Array  # (B,) int64, m: of y, in a row
    open: list[tuple[Array, Array, Array]]  # reuses not yet observed: where to enter it, of which samples, at what
    #                                         offsets; (B,), (B,) bool and (B, 3)
    began: bool  # another trajectory has begun, and nothing of it is evaluated yet
    noted: Any  # what the criterion wants to be shown at the next query, a tree of (B, ...)
    last_x: Any  # the query before the present one
    last_t: Array  # (B, T)
    direction: Array  # (B,) float64, the sign of t's first move; 0 before it

    def __init__(self, number: int):
        self.number = number  # in the order of appearance
        self.y = self.y_before = self.noted = None
        self.open, self.began = [], False

    def look(self, x: Any, clock: Array, norm: Norm, regime: Regime, once: bool = False) -> Look:
        """Compare a query with the memory; `once` says that a trajectory has no two queries at its first time."""
        if self.y is None or kind(x) != kind(self.x) or clock.shape != self.t.shape:  # another trajectory
            return self._begin(x, clock, norm)
        with np.errstate(invalid="ignore"):  # times may be infinite
            t, t_ref, t_before = _most(clock - self.t, clock, self.t, self.t_before)
            now, last = _most(clock - self.last_t, clock, self.last_t)
            moved = now - last
        step, same = np.sign(moved), (clock == self.last_t).all(1) & self.finite
        if same.any():
            parts = zip(tensors(x), tensors(self.last_x), strict=True)
            unmoved = torch.stack([(part == last).reshape(len(part), -1).all(1) for part, last in parts])
            same &= unmoved.all(0).cpu().numpy()
        anew = step * self.direction < 0
        if once:
            anew |= (self.direction == 0) & (moved == 0) & ~same
        other = np.zeros(len(anew), dtype=bool)
        if regime is not one_network:
            here, there = regime(torch.from_numpy(clock)), regime(torch.from_numpy(self.t))
            other = (here != there).any(1).numpy() & ~anew
        numbers = torch.from_numpy(np.array([t, t_ref, t_before, self.apart[:, 0], abs(moved), self.spent, step]))
        truths = torch.from_numpy(np.array([self.finite, same, anew, other]))
        return Look(
            **dict(zip(("t", "t_ref", "t_before", "difference", "since", "spent", "step"), numbers, strict=True)),
            **dict(zip(("known", "same", "anew", "other"), truths, strict=True)),
            x=x,
            norm=norm,
            branch=self.number,
            reference=(self.x, self.y),
            noted=self.noted,
        )

    def _begin(self, x: Any, clock: Array, norm: Norm) -> Look:
        """Nothing to compare with: a memory that has to be made."""
        self.began |= self.y is not None
        self.y, self.y_before, self.open = None, None, []
        t = torch.from_numpy(clock[:, 0].copy())
        zero, no = torch.zeros_like(t), torch.zeros_like(t, dtype=torch.bool)
        self.direction, self.spent, self.reuses = np.zeros(len(t)), np.zeros(len(t)), np.zeros(len(t), dtype=np.int64)
        self.apart = np.full((len(t), 3), np.inf)
        return Look(
            t=t,
            t_ref=t,
            t_before=t * torch.nan,
            difference=torch.full_like(t, torch.inf),
            since=zero,
            spent=zero,
            step=zero,
            known=no,
            same=no,
            anew=no | self.began,
            other=no,
            x=x,
            norm=norm,
            branch=self.number,
        )

    def keep(self, rows: Array, x: Any, clock: Array, y: Any, stack: Any, anew: Array, norm: Norm) -> None:
        """Move the reference of the samples `rows` (B,) bool to this query; y and stack are of these alone.

        What was the reference becomes the evaluation before, except of the samples `anew` (B,), which have none. How
        far apart they are is asked of the device, once.
        """
        earliest, self.began = self.y_before, False
        if self.y is None:
            self.x, self.y, self.stack, self.t = copy(x), copy(y), copy(stack), clock
            self.y_before, self.stack_before, self.t_before = self.y, self.stack, np.full_like(clock, np.nan)
        else:
            self.t_before = np.where(rows[:, None], np.where(anew[:, None], np.nan, self.t), self.t_before)
            if rows.all():
                self.y_before, self.stack_before = self.y, self.stack
            else:
                self.y_before = merge(rows, take(rows, self.y), self.y_before)
                self.stack_before = merge(rows, take(rows, self.stack), self.stack_before)
            self.x = merge(rows, take(rows, x), self.x)
            self.y = merge(rows, y, self.y)
            self.stack = merge(rows, stack, self.stack)
            self.t = np.where(rows[:, None], clock, self.t)
        measured = [finiteness(self.y), apart(self.y, self.y_before, norm)]
        if self.open:
            measured.append(apart(self.y, earliest, norm))
        zero, moved, *across = torch.stack(measured).cpu().numpy()
        moved = np.where(np.isnan(self.t_before).all(1), np.inf, moved)
        self.apart = np.stack([moved, self.apart[:, 0], *(across or [moved])], 1)
        self.finite, no_line = zero == 0, ~(moved < np.inf)
        if no_line.any():
            self.t_before = np.where(no_line[:, None], np.nan, self.t_before)
        self.reuses, self.spent = np.where(rows, 0, self.reuses), np.where(rows, 0.0, self.spent)

    def stand(self, x: Any, clock: Array, step: Array, spent: Array, reused: Array) -> None:
        """Remember where this query stood and how it fared; the first move of t sets a sample's direction."""
        self.direction = np.where(self.direction == 0, step, self.direction)
        self.reuses = self.reuses + reused  # Alg. 1: m = m + 1
        self.last_x, self.last_t = copy(x) if self.reuses.any() else self.x, clock
        self.spent = np.where(reused, spent, self.spent)


class Branches:
    """The branches of a run, found again by the identity of what they were conditioned on.

    What is compared is kept, so that an address freed and used again is never mistaken for the same tensor.
    """

    def __init__(self, key: Key | None):
        self.key = key
        self.known: list[tuple[Any, Branch]] = []
        self.seen = 0

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Branch:
        """The branch of this conditioning, new if it was not met before."""
        key = self.key(args, kwargs) if self.key else _identity(args, kwargs) if args or kwargs else []
        for known, branch in self.known:
            if known == key if self.key else _alike(known, key):
                return branch
        if len(self.known) == MOST_BRANCHES:
            self.known.pop(0)
            warnings.warn(
                f"More than {MOST_BRANCHES} conditionings in one run, and nothing is reused across them. If they are "
                "the same one in new tensors, pass `key=` to tell conditionings apart by something that stays.",
                stacklevel=4,
            )
        self.known.append((key, Branch(self.seen)))
        self.seen += 1
        return self.known[-1][1]

    def clear(self) -> None:
        self.known = []


def one_network(t: Tensor) -> Tensor:
    """The regime of a field that is one network throughout: the same at every t, of t's shape."""
    return torch.zeros_like(t, dtype=torch.bool)


def _most(moved: Array, *clocks: Array) -> list[Array]:
    """The reading (B,) of each clock at the token that moved most."""
    if moved.shape[1] == 1:
        return [clock[:, 0] for clock in clocks]
    token = abs(moved).argmax(1)[:, None]
    return [np.take_along_axis(clock, token, 1)[:, 0] for clock in clocks]


def _identity(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
    """What the call was conditioned on: every leaf, and of a tensor how often it has been written to.

    Nobody counts the writes to an array, to a tensor on the host, which may share its memory with one, and to a tensor
    made in inference mode: of them the contents are kept.
    """

    def state(part: Any) -> Any:
        if isinstance(part, np.ndarray):
            return part.copy()
        if not isinstance(part, Tensor):
            return 0
        uncounted = part.is_inference() or (part.device.type == "cpu" and part.layout == torch.strided)
        return part.detach().clone() if uncounted else part._version

    return [(part, state(part)) for part in leaves((args, dict(sorted(kwargs.items()))))]


def _alike(a: list[tuple[Any, Any]], b: list[tuple[Any, Any]]) -> bool:
    plain = (bool, int, float, complex, str, bytes, np.generic)

    def equal(one: Any, other: Any) -> bool:
        return one is other or (isinstance(one, plain) and type(one) is type(other) and one == other)

    def unchanged(one: Any, other: Any) -> bool:
        same = torch.equal if isinstance(one, Tensor) else np.array_equal if isinstance(one, np.ndarray) else eq
        return type(one) is type(other) and bool(same(one, other))

    return len(a) == len(b) and all(
        equal(part, other) and unchanged(state, other_state)
        for (part, state), (other, other_state) in zip(a, b, strict=True)
    )
