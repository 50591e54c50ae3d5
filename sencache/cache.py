"""SenCache, Algorithm 1 (arXiv 2602.24208): reuse a field's output while its predicted change stays small.

A `CachedField` holds the rule and no tensor. A `Run` is one trajectory under that rule: for every conditioning it
remembers each sample's last evaluation, and it is itself a velocity field. Every sample decides for itself.

Shapes: x (B, ...); t float, (), (B,) or (B, T) with T tokens; what a decision is made of, (B,) on the host.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sencache.memory import Branches, Key, clock_of, copy, take
from sencache.norms import Norm, rms
from sencache.profile import SensitivityProfile
from sencache.report import Query, Report
from sencache.trees import tensors
from solvers import Euler, Stepper, integrate
from solvers.loop import check_grid

EULER = Euler()


class Run:
    """One trajectory under a `CachedField`'s rule: a velocity field with a memory."""

    def __init__(self, rule: CachedField):
        self.rule = rule
        self.report = Report()
        self.branches = Branches(rule.key)

    def __call__(self, x: Any, t: Tensor | float, *args: Any, **kwargs: Any) -> Any:
        """The field's output at (x, t), of each sample evaluated or from memory."""
        rule = self.rule
        if _recorded((x, args, kwargs)):
            return self._bypass(rule.field(x, t, *args, **kwargs), x, t)
        clock = clock_of(t, len(tensors(x)[0]))
        branch = self.branches.find(args, kwargs)
        seen = branch.look(x, clock, rule.norm)  # ||d||, |tau|: the sums of dx and dt since the reference telescope
        _check_direction(rule.profile, seen.step * (branch.direction == 0))  # of a sample that moves for the first time
        predicted = rule.profile.predicted(seen.t_ref, seen.t, seen.distance, seen.elapsed)  # S, Eq. 9
        epsilon = rule.epsilon(seen.t)
        small = (predicted <= epsilon) & predicted.isfinite() & (epsilon > 0)  # Eq. 10; epsilon = 0 reuses nothing
        reused = small & (branch.reuses < rule.max_reuses) & ~seen.anew & ~seen.same  # Alg. 1: S <= eps and m < n

        needed = computed = ~(reused | seen.same)
        if needed.any():
            y, computed = _evaluate(rule.field, needed, x, t, args, kwargs)  # Alg. 1: y = f(x, t)
            if _recorded(y):
                return self._bypass(y if needed.all() else rule.field(x, t, *args, **kwargs), x, t)
            branch.keep(needed, x, clock, y)  # Alg. 1: the reference moves here; d, tau and m begin at 0
        branch.reuses = branch.reuses + reused  # Alg. 1: m = m + 1
        branch.stand(x, clock, seen.step)
        self.report.resets += int(seen.anew.any())
        self.report.trace.append(Query(seen.t, predicted, reused, seen.same, computed, branch.number))
        return y if needed.all() else copy(branch.y)

    def forget(self) -> None:
        """Drop every tensor that is held; the report stays."""
        self.branches.clear()

    def _bypass(self, y: Any, x: Any, t: Tensor | float) -> Any:
        """Hand out y with its gradients and keep nothing: a reused output would make them silently wrong."""
        if not self.rule.warned:
            self.rule.warned = True
            warnings.warn(
                "Gradients are being recorded, so every call is evaluated and nothing is reused. To sample, call "
                "under `torch.no_grad()`, or freeze the model with `requires_grad_(False)`.",
                stacklevel=4,
            )
        self.forget()
        t = clock_of(t, len(tensors(x)[0]))[:, 0]
        nothing = torch.zeros_like(t, dtype=torch.bool)
        self.report.trace.append(Query(t, torch.full_like(t, math.inf), nothing, nothing, ~nothing, 0))
        self.report.bypasses += 1
        return y


class CachedField:
    """A velocity field that answers from memory while the paper's rule allows it.

    field: v = field(x, t, ...). If it has `select(rows)`, which returns the field of those samples alone, only samples
        that need it are evaluated; otherwise one sample's need computes the whole batch.
    profile: what `calibrate` measured on this field.
    tolerance: epsilon, the predicted RMS change of the output, in units of v, up to which it is reused: a number, or
        a function of t such as `strict_start(ts, ...)`. At 0 everything is evaluated.
    max_reuses: n, reuses in a row of one evaluation, or `math.inf`. As in the paper's text and its authors' code, n
        are allowed; Algorithm 1 as printed allows n - 1.
    reuse: what a reuse returns; "hold" is the evaluation itself.
    norm: (B, ...) -> (B,), by default RMS; `partial(rms, mask=...)` leaves elements out.
    key: tells conditionings apart: a function of the call's further (args, kwargs) that returns something comparable.
        By default a tensor is the same conditioning as long as it is the same object, not written to.
    """

    def __init__(
        self,
        field: Callable[..., Any],
        profile: SensitivityProfile,
        *,
        tolerance: float | Callable[[float], float] = 0.1,
        max_reuses: float = 3,
        reuse: str = "hold",
        norm: Norm = rms,
        key: Key | None = None,
    ):
        if not callable(tolerance) and not tolerance >= 0:
            raise ValueError(f"`tolerance` is the size of a change and cannot be negative; got {tolerance}.")
        if not max_reuses >= 0 or (max_reuses < math.inf and max_reuses != int(max_reuses)):
            raise ValueError(f"`max_reuses` counts reuses, 0, 1, 2, ... or math.inf; got {max_reuses}.")
        if reuse != "hold":
            raise ValueError(f'`reuse` must be "hold"; got {reuse!r}.')
        measured, ours = profile.facts.get("fingerprint"), getattr(field, "fingerprint", None)
        if measured and ours and measured != ours:
            raise ValueError(
                f"The profile was measured on another model or with other settings: fingerprint {measured}, and this "
                f"field's is {ours}. Calibrate this field: `calibrate(field, x_T, ts)`."
            )
        self.field, self.profile = field, profile
        self.tolerance, self.max_reuses, self.norm, self.key = tolerance, max_reuses, norm, key
        self.warned = False
        self._thread = threading.local()  # every thread has its own current run

    def __call__(self, x: Any, t: Tensor | float, *args: Any, **kwargs: Any) -> Any:
        """The field's output at (x, t), evaluated or from memory, in this thread's current run."""
        return self._current()(x, t, *args, **kwargs)

    def integrate(self, x: Tensor, ts: Tensor, stepper: Stepper = EULER) -> Tensor:
        """The state (B, ...) at ts[-1] from x (B, ...) at ts[0], in a run of its own; `report` tells how.

        Raises ValueError where the stepper is adaptive, or the grid is not in the profile's time unit and direction.
        """
        if stepper.adaptive:
            raise ValueError(
                f"{stepper} chooses its steps by comparing outputs, and reused outputs fool it into wrong results. "
                "Integrate the bare field with it, or take a fixed-step method here: Euler, Heun, DPMSolverPP."
            )
        _check_fit(self.profile, check_grid(ts))
        with self.run() as run:
            return integrate(run, x, ts, stepper)

    @contextmanager
    def run(self) -> Iterator[Run]:
        """A scope with a memory of its own, dropped at its end, come what may; the report stays.

        Yields the run, a velocity field: hold two to interleave two trajectories. Inside the scope, calls of the
        `CachedField` itself go to the innermost run of their thread.
        """
        outer = getattr(self._thread, "run", None)
        run = self._begin()
        try:
            yield run
        finally:
            run.forget()
            self._thread.run = outer

    def reset(self) -> None:
        """Forget this thread's current run and begin another, with a new report."""
        self._begin()

    @property
    def report(self) -> Report:
        """The record of this thread's latest run."""
        if not hasattr(self._thread, "report"):
            self._begin()
        return self._thread.report

    def epsilon(self, t: Tensor) -> Tensor:
        """The tolerance at times t (B,), (B,) float64."""
        if not callable(self.tolerance):
            return torch.full_like(t, self.tolerance)
        values = torch.tensor([float(self.tolerance(at)) for at in t.tolist()], dtype=torch.float64)
        if not (values >= 0).all():
            raise ValueError(f"`tolerance` must be 0 or more at every t; got {values.tolist()} at {t.tolist()}.")
        return values

    def _current(self) -> Run:
        return getattr(self._thread, "run", None) or self._begin()

    def _begin(self) -> Run:
        run = Run(self)
        self._thread.run, self._thread.report = run, run.report
        return run

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_thread"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _thread=threading.local())


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


def _check_direction(profile: SensitivityProfile, step: Tensor) -> None:
    """Raise where the sign of a step in time (0 is no step) is against the calibrated sampler's."""
    if (step * profile.direction < 0).any():
        ways = {1: "rising", -1: "falling"}
        raise ValueError(
            f"The profile was measured with t {ways[profile.direction]}, and here t is {ways[-profile.direction]}: "
            "another time convention, in which its sensitivities belong to other times. Calibrate in this one."
        )


def _check_fit(profile: SensitivityProfile, ts: Tensor) -> None:
    """Raise where a grid (K + 1,) is not in the profile's unit of time or runs against its direction."""
    inside = int(profile.covers(ts[:-1]).sum())
    low, high = profile.t.min().item(), profile.t.max().item()
    if 2 * inside < len(ts) - 1:
        raise ValueError(
            f"The profile was measured for t in [{low:g}, {high:g}], and only {inside} of the grid's {len(ts) - 1} "
            f"steps begin there (it runs from {ts[0]:g} to {ts[-1]:g}). If that is another unit of time, calibrate in "
            "it; if it is another part of the trajectory, calibrate on a grid that covers it."
        )
    _check_direction(profile, (ts[1] - ts[0]).sign())
