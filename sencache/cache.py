"""`CachedField`: a velocity field that answers from memory; Algorithm 1 itself is in `run.py`.

Shapes: x (B, ...); ts (K + 1,); t as the sampler has it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sencache.correct import Folding, Notes, Repaying
from sencache.criteria import Differences, Planned, Sensitivities
from sencache.memory import Key
from sencache.norms import Norm, rms
from sencache.plan import Plan, plan_for
from sencache.profile import SensitivityProfile
from sencache.report import Report
from sencache.reuse import REUSES, VARIABLES
from sencache.run import Rule, Run, check_direction
from solvers import Euler, Stepper, integrate
from solvers.loop import check_grid

EULER = Euler()
Tolerance = float | Callable[[float], float]


class CachedField:
    """A velocity field that pays for a fraction of its evaluations.

    field: v = field(x, t, ...). If it has `select(rows)`, which returns the field of those samples alone, only samples
        that need it are evaluated; otherwise one sample's need computes the whole batch.
    profile: what `calibrate` measured on this field. Without one, `tolerance` goes by the field's own outputs.

    How much to pay is said in one of three ways; without any, half of the evaluations are spent.
    nfe: evaluations a sample, spent on the best schedule that the profile knows.
    rtol: RMS error of the final state relative to that state, for which the cheapest schedule is taken that was seen
        to keep it: needs a profile that went through `rehearse`.
    tolerance: epsilon, the predicted change up to which an output is reused, a number or a function of t such as
        `strict_start(ts, ...)`. With a profile it is the paper's, the RMS change of the output in units of v (Eq. 10);
        without one it is the change of the state that reuses since the last evaluation add up to. At 0 everything is
        evaluated.
    max_reuses: n, reuses in a row of one evaluation under `tolerance`, or `math.inf`; by default 3 with a profile and
        unlimited without. As in the paper's text and its authors' code, n are allowed; Algorithm 1 as printed allows
        n - 1.

    reuse: what a reuse returns: "linear" continues the line through the last two evaluations, "hold" is the last one.
    correct: whether an evaluation repays what the reuses before it owed. The default is to do so unless `reuse` is
        "hold": ``CachedField(field, profile, tolerance=0.1, max_reuses=3, reuse="hold")`` is the paper to the letter.
        It takes effect in `integrate`; where only calls are seen, give `run` the grid.
    norm: (B, ...) -> (B,), by default RMS; `partial(rms, mask=...)` leaves elements out.
    key: tells conditionings apart: a function of the call's further (args, kwargs) that returns something comparable.
        By default a tensor is the same conditioning as long as it is the same object, not written to.
    """

    def __init__(
        self,
        field: Callable[..., Any],
        profile: SensitivityProfile | None = None,
        *,
        nfe: int | None = None,
        rtol: float | None = None,
        tolerance: Tolerance | None = None,
        max_reuses: float | None = None,
        reuse: str = "linear",
        correct: bool | None = None,
        norm: Norm = rms,
        key: Key | None = None,
    ):
        check_options(nfe, rtol, tolerance, max_reuses, reuse, correct)
        if profile is None and tolerance is None:
            raise ValueError(
                "Without a profile give `tolerance`; for `nfe` or `rtol` calibrate first: `calibrate(...)`."
            )
        if profile is not None:
            check_model(profile, getattr(field, "fingerprint", None))
            if rtol is not None:
                profile.factor(1)  # raises where nothing was rehearsed
        self.field, self.profile, self.norm, self.key = field, profile, norm, key
        self.nfe, self.rtol, self.tolerance = nfe if nfe is None else int(nfe), rtol, tolerance
        self.max_reuses, self.reuse = max_reuses, reuse
        self.correct = reuse != "hold" if correct is None else correct
        self._plans: dict[str, Plan] = {}
        self._thread = threading.local()  # every thread has its own current run

    def __call__(self, x: Any, t: Tensor | float, *args: Any, **kwargs: Any) -> Any:
        """The field's output at (x, t), evaluated or from memory, in this thread's current run."""
        run = getattr(self._thread, "run", None) or self._begin(None, EULER, False)
        return run(x, t, *args, **kwargs)

    def integrate(self, x: Tensor, ts: Tensor, stepper: Stepper = EULER) -> Tensor:
        """The state (B, ...) at ts[-1] from x (B, ...) at ts[0], in a run of its own; `report` tells how.

        Raises ValueError where the stepper is adaptive, or the grid is not in the profile's time unit and direction.
        """
        with self._scope(check_grid(ts), stepper) as run:
            if not self.correct:
                return integrate(run, x, ts, stepper)
            run.ledger = notes = Notes()
            return integrate(run, x, ts, Repaying(stepper, notes))

    def run(self, ts: Tensor | None = None, stepper: Stepper = EULER) -> Any:
        """A scope with a memory of its own, dropped at its end, come what may; the report stays.

        Entering it yields the run, a velocity field: hold two to interleave two trajectories. Inside the scope, calls
        of the `CachedField` itself go to the innermost run of their thread.

        ts: the grid (K + 1,) that the sampler will walk, without which nothing is corrected and plans are for the
            calibrated grid. stepper: its method, of one evaluation a step, in whose output corrections are folded.
        """
        return self._scope(None if ts is None else check_grid(ts), stepper, fold=True)

    @contextmanager
    def _scope(self, ts: Tensor | None, stepper: Stepper, fold: bool = False) -> Iterator[Run]:
        if stepper.adaptive:
            raise ValueError(
                f"{stepper} chooses its steps by comparing outputs, and reused outputs fool it into wrong results. "
                "Integrate the bare field with it, or take a fixed-step method here: Euler, Heun, DPMSolverPP, UniPC."
            )
        outer = getattr(self._thread, "run", None)
        run = self._begin(ts, stepper, fold)
        try:
            yield run
        finally:
            run.forget()
            self._thread.run = outer

    def reset(self) -> None:
        """Forget what this thread's current run remembers and begin anew, on the same grid, with a new report."""
        run = getattr(self._thread, "run", None)
        self._begin(*(run.sampler if run else (None, EULER, False)))

    @property
    def report(self) -> Report:
        """The record of the run that this thread began last; empty before the first."""
        return getattr(self._thread, "report", None) or Report()

    def plan(self, ts: Tensor | None = None, stepper: Stepper = EULER) -> Plan:
        """The schedule that `nfe` or `rtol` leads to on the grid ts (K + 1,), by default the calibrated one."""
        if self.profile is None or self.tolerance is not None:
            raise ValueError("A plan needs a profile and `nfe` or `rtol`; here the rule decides at every step.")
        grid = self.profile.grid if ts is None else check_grid(ts).double().cpu()
        name = f"{stepper} {grid.tolist()}"
        if name not in self._plans:
            _check_fit(self.profile, grid)
            self._plans[name] = plan_for(self.profile, grid, stepper, self.reuse, self.correct, self.nfe, self.rtol)
        return self._plans[name]

    def _begin(self, ts: Tensor | None, stepper: Stepper, fold: bool) -> Run:
        run = Run(self.field, self._rule(ts, stepper), self.key)
        run.sampler = ts, stepper, fold
        if fold and self.correct and ts is not None:
            run.ledger = Folding(stepper, ts)
        self._thread.run, self._thread.report = run, run.report
        return run

    def _rule(self, ts: Tensor | None, stepper: Stepper) -> Rule:
        phi = REUSES[self.reuse]
        if self.tolerance is None:
            plan = self.plan(ts, stepper)
            criterion, variable = Planned(plan), VARIABLES[plan.variable]
            return Rule(criterion, _everywhere(math.inf), math.inf, phi, variable, self.norm)
        epsilon = self.tolerance if callable(self.tolerance) else _everywhere(self.tolerance)
        if self.profile is None:
            n = math.inf if self.max_reuses is None else self.max_reuses
            return Rule(Differences(VARIABLES["t"]), epsilon, n, phi, VARIABLES["t"], self.norm)
        if ts is not None:
            _check_fit(self.profile, ts)
        n = 3 if self.max_reuses is None else self.max_reuses
        return Rule(Sensitivities(self.profile), epsilon, n, phi, VARIABLES["t"], self.norm)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_thread"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _thread=threading.local())


def _everywhere(tolerance: float) -> Callable[[float], float]:
    return lambda t: tolerance


def check_options(
    nfe: int | None,
    rtol: float | None,
    tolerance: Tolerance | None,
    max_reuses: float | None,
    reuse: str,
    correct: bool | None,
) -> None:
    """Raise where how much to pay is not said in one way, or in a way that means nothing."""
    said = {
        name: value for name, value in (("nfe", nfe), ("rtol", rtol), ("tolerance", tolerance)) if value is not None
    }
    if len(said) > 1:
        raise ValueError(f"Say how much to pay in one way, `nfe`, `rtol` or `tolerance`; got {', '.join(said)}.")
    if nfe is not None and (nfe < 1 or nfe != int(nfe)):
        raise ValueError(f"`nfe` counts evaluations, 1, 2, ...; got {nfe}.")
    if rtol is not None and not rtol > 0:
        raise ValueError(f"`rtol` is a relative error and must be positive; got {rtol}.")
    if rtol is not None and (reuse != "linear" or correct is False):
        raise ValueError("`rtol` is rehearsed with linear reuse and correction; with other choices give `nfe`.")
    if tolerance is not None and not callable(tolerance) and not tolerance >= 0:
        raise ValueError(f"`tolerance` is the size of a change and cannot be negative; got {tolerance}.")
    if max_reuses is not None and tolerance is None:
        raise ValueError(f"`max_reuses` goes with `tolerance`; a plan knows its own. Got max_reuses={max_reuses}.")
    if max_reuses is not None and not (max_reuses >= 0 and (max_reuses == math.inf or max_reuses == int(max_reuses))):
        raise ValueError(f"`max_reuses` counts reuses, 0, 1, 2, ... or math.inf; got {max_reuses}.")
    if reuse not in REUSES:
        raise ValueError(f"`reuse` must be one of {', '.join(REUSES)}; got {reuse!r}.")


def check_model(profile: SensitivityProfile, ours: str | None) -> None:
    """Raise where a profile is of a model with another fingerprint than `ours`."""
    measured = profile.facts.get("fingerprint")
    if measured and ours and measured != ours:
        raise ValueError(
            f"The profile was measured on another model or with other settings: fingerprint {measured}, and this "
            f"field's is {ours}. Calibrate this field: `calibrate(field, x_T, ts)`."
        )


def _check_fit(profile: SensitivityProfile, ts: Tensor) -> None:
    """Raise where a grid (K + 1,) is not in the profile's unit of time or runs against its direction."""
    inside = int(profile.covers(ts[:-1].double().cpu()).sum())
    span, measured = float((ts[-1] - ts[0]).abs()), float(profile.t.max() - profile.t.min())
    if 2 * inside < len(ts) - 1 or span < 0.02 * measured:
        raise ValueError(
            f"The profile was measured for t in [{profile.t.min():g}, {profile.t.max():g}], and only {inside} of the "
            f"grid's {len(ts) - 1} steps begin there (it runs from {ts[0]:g} to {ts[-1]:g}). If that is another unit "
            "of time, calibrate in it; if it is another part of the trajectory, calibrate on a grid that covers it."
        )
    check_direction(profile.direction, (ts[1] - ts[0]).sign().cpu())
