"""What a gap owed, repaid at the next evaluation.

Between two evaluations at s_r and s_k the reused outputs were y_r + phi_j (y_r - y_2). Once y_k is known, better values
are known for all of them: the polynomial through (s_2, y_2), (s_r, y_r), (s_k, y_k). The state owes

    sum_j c_j (interpolated_j - used_j),    c_j = dx / dv_j,

and every term is a combination of the same three outputs. Only the sums over j are needed, three numbers a sample:
the moments sum_j c_j (s_j - s_r, (s_j - s_r)^2, phi_j). A stepper is linear in the outputs it is given, so the moments
are found by running the stepper itself on three numbers instead of a state: exact for every linear method, its
history included, and nothing has to be known about it.

Where a reuse goes through the head of a network, used_j is no combination of outputs. Then phi_j = 0, and one more sum
is kept in the same way, of the size of a state: the excess, sum_j c_j (used_j - y_r), which is taken off what is owed.

Shapes: B samples; moments (B, 3) float64 of the open gap, NumPy's but where a stepper runs on them; within a step of Q
queries those of Q gaps stand side by side, (B, Q, 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, repeat
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sencache.batch import Array, spread
from sencache.linear import uses_one_output
from sencache.norms import difference
from sencache.trees import replace, tensors
from solvers import Stepper, VelocityField


class Note(NamedTuple):
    """One query of a run, as far as the debt is concerned."""

    offset: Array  # (B, 3) what a reuse adds to the moments; zero where the sample was evaluated
    excess: Any  # and to the excess, a tree of tensors (B, ...); None where outputs themselves are reused
    closes: Array  # (B,) bool, the sample was evaluated
    nodes: Array  # (B, 3) s_k, s_r, s_2 of an evaluation; NaN where there was none
    outputs: tuple[Any, Any, Any]  # y_k, y_r, y_2, trees of tensors (B, ...)
    anew: Array  # (B,) bool, another trajectory begins: what was owed is not owed by it
    same: Array  # (B,) bool, the query before was asked again
    branch: int  # which conditioning


def offset(u: Array, phi: Array) -> Array:
    """What a reuse at u = s - s_r (B,) adds to the moments, (B, 3)."""
    return np.array([u, u**2, phi]).T


def owed(moments: Array, nodes: Array) -> Array:
    """The weights (..., 3) of y_k, y_r, y_2 in what a gap owes, from its moments (..., 3) and nodes (..., 3).

    Newton's form, y_r + u slope + u (s - s_k) curvature with u = s - s_r; without a y_2 the line alone.
    """
    (first, second, phi), (s_k, s_r, s_2) = ([each[..., i] for i in range(3)] for each in (moments, nodes))
    s_2 = np.where(s_2 == s_r, np.nan, s_2)  # two evaluations at one time make no line
    with np.errstate(divide="ignore", invalid="ignore"):
        rate, rate_before = 1 / (s_k - s_r), 1 / (s_r - s_2)
        bend = (second - (s_k - s_r) * first) / (s_k - s_2)  # of the curvature, slope minus the slope before
        k, two = (first + _finite(bend)) * rate, _finite(bend * rate_before) + phi
    some = (first != 0) | (second != 0) | (phi != 0)
    return np.where(some[..., None], np.stack([k, -k - two, two], -1), 0.0)


def _finite(values: Array) -> Array:
    return np.where(np.isfinite(values), values, 0.0)


def observed(offsets: Array, nodes: Array, apart: Array) -> Array:
    """The RMS errors (R, B) of reuses of `offsets` (R, B, 3), as the polynomial through the `nodes` (B, 3) shows them.

    apart: (B, 3) float64, the norms of y_k - y_r, y_2 - y_r and y_k - y_2, of which all combinations are made.
    """
    weights = owed(offsets, nodes)
    k, two = weights[..., 0], weights[..., 2]
    squares = np.where(two[..., None] == 0, apart[..., :1], apart) ** 2  # there may be no y_2
    side, other, across = (squares[..., i] for i in range(3))
    with np.errstate(invalid="ignore", over="ignore"):
        product = (side + other - across) / 2  # <y_k - y_r, y_2 - y_r>
        return np.sqrt(np.maximum(k**2 * side + two**2 * other + 2 * k * two * product, 0))


def beyond(used: Any, y_r: Any, evaluated: Array) -> Any:
    """What a reuse adds to the excess: used - y_r, a tree of (B, ...); zero of the samples `evaluated` (B,) bool."""
    last = used if evaluated.all() else y_r
    pairs = zip(tensors(used), tensors(last), strict=True)
    return _scaled(replace(used, [difference(*pair) for pair in pairs]), ~evaluated)


def repaid(state: Any, weights: Array, outputs: tuple[Any, Any, Any], excess: Any = None) -> Any:
    """A state, a tree of (B, ...), plus y_k, y_r, y_2 weighted by (B, 3), summing to 0, less the excess.

    In float32 or better.
    """
    if not weights.any() and not any(part.any() for part in tensors(excess)):
        return state

    def sum_of(part: Tensor, y_k: Tensor, y_r: Tensor, y_2: Tensor, excess: Tensor | float) -> Tensor:
        wide = part.to(torch.promote_types(part.dtype, torch.float32))
        k, two = weights[:, 0], weights[:, 2]
        return (wide + _share(k, difference(y_k, y_r)) + _share(two, difference(y_2, y_r)) - excess).to(part.dtype)

    parts = zip(*map(tensors, (state, *outputs)), tensors(excess) or repeat(0.0), strict=False)
    return replace(state, [sum_of(*part) for part in parts])


def _share(factors: Array, part: Tensor) -> Tensor:
    """A tensor (B, ...), each sample times its factor (B,), and 0 where that is 0, whatever the sample holds."""
    factor = spread(factors, part)
    return factor * part if factors.all() else torch.where(factor == 0, 0.0, factor * part)


def _scaled(tree: Any, factors: Array) -> Any:
    """`_share` of every tensor in a tree."""
    return replace(tree, [_share(factors, part) for part in tensors(tree)])


class Ledger(Protocol):
    """Where a run enters what each query did."""

    def enter(self, y: Any, note: Note, t: Array) -> Any:
        """The answer to hand out for a query at t (B,) that would be y."""


class Notes(list[Note]):
    """A ledger for `Repaying`: the queries of the present step."""

    def enter(self, y: Any, note: Note, t: Array) -> Any:
        self.append(note)
        return y


class Folding:
    """A ledger for a sampler that only calls: what a gap owed is folded into the evaluation that ends it.

    The sampler is known by its grid ts (K + 1,) and by `stepper`, which must be linear in one output a step, so that
    x_next = state * x + field * v: to owe x is to owe v (state / field) as much. Queries off the grid by more than a
    quarter of its smallest step owe nothing. Raises ValueError for a stepper that uses more outputs.
    """

    def __init__(self, stepper: Stepper, ts: Tensor):
        self.ts = ts.double().cpu()
        if not uses_one_output(stepper, self.ts):
            raise ValueError(
                "Corrections are folded into bare calls for steppers of one output a step (Euler, DPMSolverPP of order "
                f"1, EulerMaruyama); {stepper} uses more. Call `integrate`, or switch corrections off with "
                "`correct=False`."
            )
        weights = [torch.stack(stepper.weights(*step)).double() for step in pairwise(self.ts)]
        self.state, self.gain = torch.stack(weights).T.numpy()  # (K,) each
        self.begins, self.slack = self.ts[:-1].numpy(), float(self.ts.diff().abs().min() / 4)
        self.open: dict[int, tuple[Array, Any]] = {}  # moments (B, 3) and excess of each conditioning
        self.folded: dict[int, tuple[Array, tuple[Any, Any, Any], Any]] = {}  # what its last query was repaid

    def enter(self, y: Any, note: Note, t: Array) -> Any:
        if note.same.all():  # asked again, answered again
            return repaid(y, *self.folded[note.branch])
        gaps = abs(t[:, None] - self.begins)
        k, on_grid = gaps.argmin(1), gaps.min(1) <= self.slack
        moments, excess = self.open.get(note.branch, (np.zeros((0, 3)), None))
        if len(moments) != len(t) or note.anew.all():
            moments, excess = np.zeros_like(note.offset), _scaled(note.excess, np.zeros_like(t))
        moments, excess = np.where(note.anew[:, None], 0.0, moments), _scaled(excess, ~note.anew)
        share = np.where(note.closes & on_grid, self.state[k] / self.gain[k], 0.0)
        self.folded[note.branch] = owed(moments, note.nodes) * share[:, None], note.outputs, _scaled(excess, share)

        goes_on = ~note.closes & on_grid
        state, gain = (np.where(goes_on, weight[k], 0.0) for weight in (self.state, self.gain))
        state, gain = np.where(note.same, 1.0, state), np.where(note.same, 0.0, gain)
        moved = [
            a + b for a, b in zip(*map(tensors, (_scaled(excess, state), _scaled(note.excess, gain))), strict=True)
        ]
        self.open[note.branch] = state[:, None] * moments + gain[:, None] * note.offset, replace(excess, moved)
        return repaid(y, *self.folded[note.branch])


class Repaying:
    """A stepper that repays, after each step, the gaps that the step's evaluations closed.

    `notes` is the ledger of the run that it steps. State and history are both corrected, so that a multistep method
    goes on from what it would have seen.
    """

    def __init__(self, stepper: Stepper, notes: Notes):
        self.stepper, self.notes = stepper, notes
        self.order, self.adaptive, self.weights = stepper.order, stepper.adaptive, stepper.weights
        self.linear: Stepper = getattr(stepper, "linear", stepper)

    def advance(self, field: VelocityField, x: Tensor, t: Tensor, t_next: Tensor, memory: Any) -> tuple[Tensor, Any]:
        self.notes.clear()
        history, sums = memory or (None, [])
        dx, history = self.stepper.advance(field, x, t, t_next, history)

        closes = np.array([note.closes for note in self.notes])  # (Q, B)
        terms = [[torch.from_numpy(note.offset) for note in self.notes]]
        if self.notes[0].excess is not None:
            terms.append([note.excess.reshape(len(x), -1) for note in self.notes])
        ended, sums = due(self.linear, sums, terms, closes, history is None, t, t_next)
        for note, each in zip(self.notes, ended, strict=True):
            closed = note.closes & ~note.anew
            if each and closed.any():
                moments, *excess = each
                off = [_share(closed, part) if part.ndim > 1 else part for part in tensors(excess)]
                dx, history = paid((dx, history), shares(moments, note.nodes, closed), note.outputs, off)
        return dx, (history, sums)


def due(
    linear: Stepper, sums: list[Sums], terms: list[list[Tensor]], closes: Array, alone: bool, t: Tensor, t_next: Tensor
) -> tuple[list[list[Sums]], list[Sums]]:
    """The sums that the gaps come to which the Q queries of a step close, none where nothing was reused; and the open.

    linear: the stepper without its noise; sums: those that were open, of each kind of `terms`, (B, n) of each query;
    closes: (Q, B), whether it was evaluated; alone: whether the stepper has no history.
    """
    # The sums of a gap that has just begun are zero, and are kept only for the history that a stepper may have.
    begun = alone and bool(closes[-1].all())
    if begun and not sums and closes.all():  # nothing was reused, neither here nor before
        return [[]] * len(closes), []
    lies_in = closes.cumsum(0)  # the gap of each query: 0 was open before, and each evaluation opens another
    sums = sums or [Sums(torch.zeros_like(parts[0]), None) for parts in terms]
    sums = [one.step(linear, parts, lies_in, t, t_next) for one, parts in zip(sums, terms, strict=True)]
    ended = [[one.of(closed) for one in sums] for closed in lies_in - closes]
    return ended, [] if begun else [one.of(lies_in[-1]) for one in sums]


class Sums(NamedTuple):
    """Sums over the reuses of a gap, as the stepper weighs them: what it makes of their terms in place of outputs."""

    state: Tensor  # (B, n)
    history: Any

    def step(self, stepper: Stepper, terms: list[Tensor], lies_in: Array, t: Tensor, t_next: Tensor) -> Sums:
        """The sums of Q gaps side by side, (B, Q, n), after a step of Q queries; the open gap becomes gap 0.

        terms: (B, n) of each query; lies_in: (Q, B) its gap. Gap Q, which the last query may open, holds nothing yet.
        """
        gaps, first = len(terms), 0 * lies_in[0]
        aside = iter([_in_gap(term, gap, gaps) for term, gap in zip(terms, lies_in, strict=True)])
        state, history = _each(self, lambda part: _in_gap(part, first, gaps))
        t, t_next = t.to(state.device), t_next.to(state.device)
        change, history = stepper.advance(lambda m, t: next(aside), state, t, t_next, history)
        return Sums(state + change, history)

    def of(self, gap: Array) -> Sums:
        """Of gaps side by side, the sums (B, n) of `gap` (B,)."""
        if not gap.any():
            return _each(self, lambda part: part[:, 0])
        gaps, rows = self.state.shape[1], np.arange(len(gap))
        begun = torch.from_numpy(gap < gaps).to(self.state.device)[:, None]
        return _each(self, lambda part: torch.where(begun, part[rows, np.minimum(gap, gaps - 1)], 0.0))


def _each(sums: Sums, change: Callable[[Tensor], Tensor]) -> Sums:
    """Every sum changed; what is none, such as a step's length in the history, is kept."""
    return replace(sums, [change(part) if part.ndim > 1 else part for part in tensors(sums)])


def _in_gap(sums: Tensor, gap: Array, gaps: int) -> Tensor:
    """Sums (B, n) as those of `gap` (B,) among several: (B, gaps, n), zero elsewhere."""
    if gaps == 1:
        return sums[:, None]
    here = torch.from_numpy(gap[:, None] == np.arange(gaps))
    return torch.where(here.to(sums.device)[:, :, None], sums[:, None], 0.0)


def shares(moments: Sums, nodes: Array, closed: Array) -> list[Array | None]:
    """The weights (B, 3) of y_k, y_r, y_2 in what dx and each tensor of the history owe; None of a step's length.

    Of the samples `closed` (B,) bool, whose gap ended.
    """
    parts = [part.numpy() if part.ndim > 1 else None for part in tensors(moments)]
    return [None if part is None else np.where(closed[:, None], owed(part, nodes), 0.0) for part in parts]


def paid(states: Any, weights: list[Array | None], outputs: tuple[Any, Any, Any], excess: Sequence[Tensor] = ()) -> Any:
    """Dx and history with their shares (B, 3) of the outputs y_k, y_r, y_2, each less its excess (B, n)."""

    def one(part: Tensor, share: Array | None, off: Tensor | None) -> Tensor:
        if share is None:
            return part
        return repaid(part, share, outputs, None if off is None else off.reshape(part.shape))

    parts = zip(tensors(states), weights, excess or repeat(None), strict=False)
    return replace(states, [one(*three) for three in parts])
