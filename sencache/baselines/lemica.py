"""LeMiCa (Gao et al. 2025, arXiv 2511.00090; schedules for Wan: the fork scruffynerf/LeMiCa).

Skipping a segment, evaluating at steps i and j and reusing i in between, does something to the final sample:

    w(i -> j) = mean |x_0 with that segment skipped - x_0|,    Eq. 4.

The segments make a graph, and of its paths from the first to the last step with exactly B evaluations the best is the
one whose largest weight is the least, then whose second largest, and so on (Eq. 5). It is a static schedule.
Shapes: B samples; ts (K + 1,); errors (K, L), of segments of 1 to L steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sencache.baselines.steps import full_run, mean_abs
from sencache.batch import copy
from sencache.cache import CachedField
from sencache.criteria import Scheduled
from sencache.influence import influence
from sencache.memory import one_network
from solvers import Euler, Stepper

EULER = Euler()


def segment_errors(
    field: Any,
    x: Tensor,
    ts: Tensor,
    stepper: Stepper = EULER,
    *,
    longest: int = 8,
    payload: str = "blocks",
    progress: bool = True,
    **options: Any,
) -> list[list[float]]:
    """The weights of the graph: row i has w(i -> i + 1) = 0, w(i -> i + 2), ..., up to `longest` steps or the last one.

    Means over the elements and over samples from x (B, ...) at ts[0]. Each segment of two steps or more is a run of
    its own, which takes what it has in common with the full run from there and evaluates step j and all later ones:
    with K = 50 and longest = 8 in all 7309 evaluations a sample, as many as 146 full runs.
    The full run's K outputs (or stacks) are kept meanwhile. `payload` and `options` are `CachedField`'s; by default
    the block stack is held, as the authors do.

    Raises ValueError for a stepper of several outputs a step.
    """
    times = influence(stepper, ts)[0]
    steps = len(ts) - 1
    if len(times) != steps:
        raise ValueError(
            f"Segments are of steps with one output each; {stepper} asks for {len(times)} in {steps} steps."
        )
    if longest < 1:
        raise ValueError(f"`longest` counts the steps of a segment, 1, 2, ...; got {longest}.")
    options = {"reuse": "hold", **options, "payload": payload}
    known = _Known(field, payload)
    full = full_run(known, x, ts, stepper)
    segments = [(i, j) for i in range(steps) for j in range(i + 2, min(i + longest, steps - 1) + 1)]
    errors = [[0.0] * (i < steps - 1) for i in range(steps)]
    with torch.no_grad():
        for i, j in tqdm(segments, desc="segments", disable=not progress):
            nodes = torch.tensor([k for k in range(steps) if not i < k < j], device="cpu")
            known.begin(i + 1)
            end = CachedField(known, criterion=Scheduled(times, nodes), **options).integrate(x, ts, stepper)
            errors[i].append(float(mean_abs(end - full).mean()))
    return errors


class _Known:
    """A field whose first outputs, or block stacks, are known from a full run and not evaluated again."""

    def __init__(self, field: Any, payload: str):
        self.field, self.payload = field, payload
        self.kept: list[Any] = []  # of the full run, step by step
        self.known = self.asked = 0
        self.regime = getattr(field, "regime", one_network)

    def begin(self, known: int) -> None:
        """Another run, of which the first `known` evaluations are those of the full one."""
        self.known, self.asked = known, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.payload == "blocks":
            return self.head(x, t, self.stack(x, t))
        return self._recall(lambda: self.field(x, t))

    def stack(self, x: Tensor, t: Tensor) -> Any:
        return self._recall(lambda: self.field.stack(x, t))

    def head(self, x: Tensor, t: Tensor, stack: Any) -> Tensor:
        return self.field.head(x, t, stack)

    def _recall(self, evaluate: Callable[[], Any]) -> Any:
        self.asked += 1
        if self.asked <= self.known:
            return copy(self.kept[self.asked - 1])
        value = evaluate()
        if not self.known:  # the full run itself
            self.kept.append(copy(value))
        return value


def minimax_path(errors: Sequence[Sequence[float]], nfe: int) -> list[int]:
    """The lexicographic minimax path of exactly `nfe` evaluations, of which the first and the last step are two.

    errors: of `segment_errors`. A segment added to two paths leaves their order as it was, so that the best path to
    each step with each number of evaluations is enough. Raises ValueError where there is none.
    """
    steps = len(errors)
    best: dict[int, tuple[list[float], list[int]]] = {0: ([], [0])}  # by last step: weights, largest first, and path
    for _ in range(nfe - 1):
        longer: dict[int, tuple[list[float], list[int]]] = {}
        for i, (weights, path) in best.items():
            for j, weight in enumerate(errors[i], i + 1):
                found = sorted([*weights, weight], reverse=True), [*path, j]
                longer[j] = min(found, longer.get(j, found))
        best = longer
    if nfe < 1 or steps - 1 not in best:
        least = 1 + math.ceil((steps - 1) / max(1, *map(len, errors)))
        raise ValueError(f"No path of {nfe} evaluations: with these segments {least} to {steps} are possible.")
    return best[steps - 1][1]


def lemica(errors: Sequence[Sequence[float]], ts: Tensor, nfe: int, stepper: Stepper = EULER) -> Scheduled:
    """The schedule of `nfe` evaluations on the grid ts (K + 1,) whose `segment_errors` these are."""
    if len(errors) != len(ts) - 1:
        raise ValueError(
            f"The segments are of {len(errors)} steps, and the grid has {len(ts) - 1}: measure them on it."
        )
    return Scheduled(influence(stepper, ts)[0], torch.tensor(minimax_path(errors, nfe), device="cpu"))
