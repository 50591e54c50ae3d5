"""What a gap owed, repaid at the next evaluation.

Between two evaluations at s_r and s_k the reused outputs were y_r + phi_j (y_r - y_2). Once y_k is known, better values
are known for all of them: the polynomial through (s_2, y_2), (s_r, y_r), (s_k, y_k). The state owes

    sum_j c_j (interpolated_j - used_j),    c_j = dx / dv_j,

and every term is a combination of the same three outputs. Only the sums over j are needed, three numbers a sample:
the moments sum_j c_j (s_j - s_r, (s_j - s_r)^2, phi_j). A stepper is linear in the outputs it is given, so the moments
are found by running the stepper itself on three numbers instead of a state: exact for every linear method, its
history included, and nothing has to be known about it.

Shapes: B samples; moments (B, 3) float64 on the host, of the open gap; within a step of Q queries those of up to Q + 1
gaps stand side by side, (B, 3 (Q + 1)).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from sencache.memory import spread
from sencache.norms import difference
from sencache.trees import replace, tensors
from solvers import Stepper, VelocityField


class Note(NamedTuple):
    """One query of a run, as far as the debt is concerned."""

    offset: Tensor  # (B, 3) what a reuse adds to the moments; zero where the sample was evaluated
    closes: Tensor  # (B,) bool, the sample was evaluated
    nodes: Tensor  # (B, 3) s_k, s_r, s_2 of an evaluation; NaN where there was none
    outputs: tuple[Any, Any, Any]  # y_k, y_r, y_2, trees of tensors (B, ...)
    anew: Tensor  # (B,) bool, another trajectory begins: what was owed is not owed by it
    same: Tensor  # (B,) bool, the query before was asked again
    branch: int  # which conditioning


def offset(u: Tensor, phi: Tensor) -> Tensor:
    """What a reuse at u = s - s_r (...,) adds to the moments, (..., 3)."""
    return torch.stack([u, u**2, phi], -1)


def owed(moments: Tensor, nodes: Tensor) -> Tensor:
    """The weights (B, 3) of y_k, y_r, y_2 in what a gap owes, from its moments (B, 3) and nodes (B, 3).

    Newton's form, y_r + u slope + u (s - s_k) curvature with u = s - s_r; without a y_2 the line alone.
    """
    first, second, phi = moments.unbind(1)
    s_k, s_r, s_2 = nodes.unbind(1)
    s_2 = s_2.where(s_2 != s_r, torch.nan)  # two evaluations at one time make no line
    rate, rate_before = 1 / (s_k - s_r), 1 / (s_r - s_2)
    bend = (second - (s_k - s_r) * first) / (s_k - s_2)  # of the curvature, slope minus the slope before
    k, two = (first + bend.nan_to_num(0.0)) * rate, (bend * rate_before).nan_to_num(0.0, 0.0, 0.0) + phi
    weights = torch.stack([k, -k - two, two], 1)
    return torch.where((moments != 0).any(1, keepdim=True), weights, 0.0)


def repaid(state: Any, weights: Tensor, outputs: tuple[Any, Any, Any]) -> Any:
    """A state, a tree of (B, ...), plus y_k, y_r, y_2 weighted by (B, 3), summing to 0; in float32 or better."""
    if not weights.any():
        return state

    def sum_of(part: Tensor, y_k: Tensor, y_r: Tensor, y_2: Tensor) -> Tensor:
        wide = part.to(torch.promote_types(part.dtype, torch.float32))
        k, _, two = (spread(weight, wide) for weight in weights.unbind(1))
        return (wide + k * difference(y_k, y_r) + two * difference(y_2, y_r)).to(part.dtype)

    return replace(state, [sum_of(*parts) for parts in zip(*map(tensors, (state, *outputs)), strict=True)])


class Ledger(Protocol):
    """Where a run enters what each query did."""

    def enter(self, y: Any, note: Note, t: Tensor) -> Any:
        """The answer to hand out for a query at t (B,) that would be y."""


class Notes(list[Note]):
    """A ledger for `Repaying`: the queries of the present step."""

    def enter(self, y: Any, note: Note, t: Tensor) -> Any:
        self.append(note)
        return y


class Folding:
    """A ledger for a sampler that only calls: what a gap owed is folded into the evaluation that ends it.

    The sampler is known by its grid ts (K + 1,) and by `stepper`, which must be linear in one output a step, so that
    x_next = state * x + field * v: to owe x is to owe v (state / field) as much. Queries off the grid owe nothing.
    Raises ValueError for a stepper that uses more outputs.
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
        self.state, self.gain = torch.stack(weights).T  # (K,) each
        self.moments: dict[int, Tensor] = {}  # (B, 3) of each conditioning
        self.folded: dict[int, tuple[Tensor, tuple[Any, Any, Any]]] = {}  # what its last query was repaid

    def enter(self, y: Any, note: Note, t: Tensor) -> Any:
        if note.same.all():  # asked again, answered again
            return repaid(y, *self.folded[note.branch])
        gap, k = (t[:, None] - self.ts[:-1]).abs().min(1)
        on_grid = gap <= 1e-6 * self.ts.diff().abs().min()
        moments = self.moments.get(note.branch, torch.zeros(0, 3, dtype=torch.float64))
        moments = moments if len(moments) == len(t) else torch.zeros_like(note.offset)
        moments = moments.masked_fill(note.anew[:, None], 0)
        weights = owed(moments, note.nodes) * (self.state / self.gain)[k, None]
        weights = torch.where((note.closes & on_grid)[:, None], weights, 0.0)
        moved = self.state[k, None] * moments + self.gain[k, None] * note.offset
        moved = torch.where((~note.closes & on_grid)[:, None], moved, 0.0)
        self.moments[note.branch] = torch.where(note.same[:, None], moments, moved)
        self.folded[note.branch] = weights, note.outputs
        return repaid(y, weights, note.outputs)


def uses_one_output(stepper: Stepper, ts: Tensor) -> bool:
    """Whether two steps of outputs 1 and 0 go as `weights` says: one output a step, and no history."""
    linear, outputs = getattr(stepper, "linear", stepper), iter([1.0, 0.0])
    x, memory, expected = torch.zeros(1, 1, dtype=torch.float64), None, torch.zeros(1, 1, dtype=torch.float64)
    try:
        middle = ts.double().cpu()[max(0, len(ts) // 2 - 2) :]  # an end of the grid may be a lower-order step
        for output, (t, t_next) in zip((1.0, 0.0), pairwise(middle), strict=False):
            dx, memory = linear.advance(lambda x, t: torch.full_like(x, next(outputs)), x, t, t_next, memory)
            weights = linear.weights(t, t_next)
            x, expected = x + dx, weights.state * expected + weights.field * output
        return torch.allclose(x, expected)
    except (StopIteration, RuntimeError):  # it asked for more than one
        return False


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
        history, moments, moment_history = memory or (None, torch.zeros(len(x), 3, dtype=torch.float64), None)
        self.notes.clear()
        dx, history = self.stepper.advance(field, x, t, t_next, history)

        closes = torch.stack([note.closes for note in self.notes]).long()  # (Q, B)
        lies_in = closes.cumsum(
            0
        )  # the gap of each query: 0 is the one that was open, and each evaluation opens another
        most = len(closes)
        offsets = iter([_in_gap(note.offset, gap, most) for note, gap in zip(self.notes, lies_in, strict=True)])
        moments, moment_history = _each((moments, moment_history), lambda m: _in_gap(m, 0 * lies_in[0], most))
        change, moment_history = self.linear.advance(
            lambda m, t: next(offsets), moments, t.cpu(), t_next.cpu(), moment_history
        )
        moments = moments + change

        for note, closed in zip(self.notes, lies_in - closes, strict=True):
            dx = _repaid(dx, moments, note, closed)
            history = _repaid_history(history, moment_history, note, closed)
        moments, moment_history = _each((moments, moment_history), lambda m: _of_gap(m, lies_in[-1]))
        return dx, (history, moments, moment_history)


def _each(moments: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tree of moments (B, ...), each changed; what is no moment, such as a step's length, is kept."""
    return replace(moments, [change(part) if part.ndim == 2 else part for part in tensors(moments)])


def _in_gap(moments: Tensor, gap: Tensor, most: int) -> Tensor:
    """Moments (B, 3) as those of `gap` (B,) among gaps 0 to `most`: (B, 3 (most + 1)), zero elsewhere."""
    return (one_hot(gap, most + 1)[:, :, None] * moments[:, None]).flatten(1)


def _of_gap(moments: Tensor, gap: Tensor) -> Tensor:
    """The moments (B, 3) of `gap` (B,)."""
    return moments.unflatten(1, (-1, 3))[torch.arange(len(gap)), gap]


def _repaid(state: Tensor, moments: Tensor, note: Note, gap: Tensor) -> Tensor:
    """A state (B, ...) with what the gap (B,) that a query closed owes, of the samples where it closed one."""
    weights = torch.where(note.closes[:, None], owed(_of_gap(moments, gap), note.nodes), 0.0)
    return repaid(state, weights, note.outputs)


def _repaid_history(history: Any, moments: Any, note: Note, gap: Tensor) -> Any:
    """A stepper's history with every state in it repaid by its own moments."""
    pairs = zip(tensors(history), tensors(moments), strict=True)
    return replace(history, [_repaid(part, m, note, gap) if m.ndim == 2 else part for part, m in pairs])
