"""`CachedField`: a velocity field that answers from memory; Algorithm 1 itself is in `run.py`.

Shapes: x (B, ...); ts (K + 1,); t as the sampler has it.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sencache.checks import check_fit, check_fixed, check_model, check_options, check_path, check_payload, check_profile
from sencache.correct import Folding, Notes, Repaying
from sencache.criteria import Differences, Gains, Planned, Sensitivities
from sencache.influence import charges
from sencache.linear import check_linear
from sencache.memory import Key, one_network
from sencache.norms import Norm, rms
from sencache.plan import Plan, plan_for
from sencache.profile import SensitivityProfile
from sencache.report import Report
from sencache.reuse import REUSES, VARIABLES
from sencache.run import Criterion, Rule, Run
from sencache.walk import Script, is_constant, script, walking
from solvers import Euler, Stepper, integrate
from solvers.loop import check_grid

EULER = Euler()
Tolerance = float | Callable[[float], float]
Sampler = tuple[str, bytes]  # a stepper's name, and its grid


class CachedField:
    """A velocity field that pays for a fraction of its evaluations.

    field: v = field(x, t, ...). If it has `select(rows)`, which returns the field of those samples alone, only samples
        that need it are evaluated; otherwise one sample's need computes the whole batch (see `together`).
    profile: what `calibrate` measured on this field, or what is `assumed` of it, good for `nfe` alone. Without one,
        `tolerance` goes by the field's own outputs.
    criterion: another judge in place of the profile, such as those of `sencache.baselines`, or one of your own: a
        `Criterion` or `Watching` of `run.py`. `tolerance` is then in its unit, and `max_reuses` unlimited by default.
        A `Scheduled` one says itself where to evaluate and needs no tolerance.

    How much to pay is said in one of three ways; without any, half of the evaluations are spent.
    nfe: evaluations a sample, spent on the best schedule that the profile knows.
    rtol: RMS error of the final state relative to that state, for which the cheapest schedule is taken that was seen
        to keep it: needs a profile that went through `rehearse`.
    tolerance: epsilon, the predicted change up to which an output is reused, a number or a function of t such as
        `strict_start(ts, ...)` or `planned_tolerance(plan, profile)`. At 0 everything is evaluated.
    max_reuses: n, reuses in a row of one evaluation under `tolerance`, or `math.inf`; by default 3 in units of the
        output and unlimited in units of the sample. As in the paper's text and its authors' code, n are allowed;
        Algorithm 1 as printed allows n - 1.
    unit: of `tolerance`. "output" is the paper's, the RMS change of the output (Eq. 10), and the default with a
        profile. "sample", the default without one, weighs each change by what the stepper makes of it in the sample
        and adds up those since the last evaluation, so that a tolerance means the same on every grid.

    reuse: what a reuse returns: "linear" continues the line through the last two evaluations, "hold" is the last one.
        Where `nfe` leaves only gaps too long for lines to be stable in, a plan may hold, and then nothing is repaid:
        `plan` tells.
    payload: what it is that is continued: the "output", or by "blocks" what a transformer's blocks add to its tokens,
        as the authors' code does. Then embeddings and head run at every query, on the true x and t, which is not
        counted as an evaluation; and the field needs `stack(x, t)` and `head(x, t, stack)`, of which
        `head(x, t, stack(x, t))` is its output. By "difference" it is output minus state, added to the present state,
        as EasyCache does.
    correct: whether an evaluation repays what the reuses before it owed. The default is to do so unless `reuse` is
        "hold": ``CachedField(field, profile, tolerance=0.1, max_reuses=3, reuse="hold")`` is the paper to the letter.
        It takes effect in `integrate`; where only calls are seen, give `run` the grid.
    together: whether samples decide together: as soon as one of them needs an evaluation, all take it, and a sample
        depends on its company, which it does not otherwise. The default is to do so where nothing was calibrated and
        the field has no `select`: then one sample's need computes all of them, and what is computed is used. The
        paper's rule is each sample's own, and under a plan it makes no difference.
    norm: (B, ...) -> (B,), by default RMS; `partial(rms, mask=...)` leaves elements out.
    key: tells conditionings apart: a function of the call's further (args, kwargs) that returns something comparable.
        By default a tensor is the same conditioning as long as it is the same object, not written to.
    """

    def __init__(
        self,
        field: Callable[..., Any],
        profile: SensitivityProfile | None = None,
        *,
        criterion: Criterion | None = None,
        nfe: int | None = None,
        rtol: float | None = None,
        tolerance: Tolerance | None = None,
        max_reuses: float | None = None,
        unit: str | None = None,
        reuse: str = "linear",
        payload: str = "output",
        correct: bool | None = None,
        together: bool | None = None,
        norm: Norm = rms,
        key: Key | None = None,
    ):
        check_options(nfe, rtol, tolerance, max_reuses, unit, reuse, correct, together, criterion)
        check_payload(field, payload, rtol)
        if profile is not None and criterion is not None:
            raise ValueError("Who decides, the `profile` or the `criterion`? Give one of them.")
        if profile is not None:
            check_profile(profile)
            check_model(profile, getattr(field, "fingerprint", None))
            check_path(profile, getattr(field, "path", None))
            if rtol is not None:
                profile.shortest(rtol)  # raises where nothing was rehearsed
        elif tolerance is None and criterion is None:
            raise ValueError(
                "Without a profile give `tolerance`; for `nfe` or `rtol` calibrate first, `calibrate(...)`, or for "
                "`nfe` assume a profile, `assumed(path, ts)`."
            )
        self.field, self.profile, self.criterion, self.norm, self.key = field, profile, criterion, norm, key
        self.nfe, self.rtol, self.tolerance = nfe if nfe is None else int(nfe), rtol, tolerance
        self.max_reuses, self.reuse, self.payload = max_reuses, reuse, payload
        own_outputs = profile is None and criterion is None
        self.unit = unit or ("sample" if own_outputs else "output")
        self.correct = reuse != "hold" if correct is None else correct
        self.together = own_outputs and not hasattr(field, "select") if together is None else together
        self._plans: dict[Sampler, tuple[Stepper | None, Plan]] = {}  # who is kept shares an address with no other
        self._scripts: dict[Sampler, tuple[Any, ...]] = {}  # of whom, not kept alive; of which plan, repaid or not
        self._thread = threading.local()  # every thread has its own current run

    def __call__(self, x: Any, t: Tensor | float, *args: Any, **kwargs: Any) -> Any:
        """The field's output at (x, t), evaluated or from memory, in this thread's current run."""
        run = getattr(self._thread, "run", None) or self._begin(None, EULER, False)
        return run(x, t, *args, **kwargs)

    def integrate(self, x: Tensor, ts: Tensor, stepper: Stepper = EULER) -> Tensor:
        """The state (B, ...) at ts[-1] from x (B, ...) at ts[0], in a run of its own, of which `report` tells after.

        Raises ValueError where the stepper is adaptive, or the grid is not in the profile's time unit and direction.
        """
        ts = check_grid(ts).detach()
        script = self._script(ts, stepper)
        if script is None:
            with self.following(ts, stepper) as (run, corrected):
                return integrate(run, x, ts, corrected)
        with self._scope(ts, stepper) as run, walking(self.field, stepper, script, self.norm, run.report) as walk:
            return integrate(walk.field, x, ts, walk)

    @contextmanager
    def following(self, ts: Tensor, stepper: Stepper = EULER) -> Iterator[tuple[Run, Stepper]]:
        """A run over ts (K + 1,), and the stepper to carry it along there, which corrects state and history itself."""
        ts = check_grid(ts).detach()
        with self._scope(ts, stepper) as run:
            if self._repays(ts, stepper):
                if not self._planned():  # a plan has asked already
                    check_linear(stepper, ts)
                run.ledger = notes = Notes()
                stepper = Repaying(stepper, notes)
            yield run, stepper

    def run(self, ts: Tensor | None = None, stepper: Stepper = EULER) -> Any:
        """A scope with a memory of its own, dropped at its end, come what may; the report stays.

        Entering it yields the run, a velocity field: hold two to interleave two trajectories. Inside the scope, calls
        of the `CachedField` itself go to the innermost run of their thread.

        ts: the grid (K + 1,) that the sampler will walk, without which nothing is corrected and plans are for the
            calibrated grid. stepper: its method, of one evaluation a step, in whose output corrections are folded.
        """
        return self._scope(None if ts is None else check_grid(ts).detach(), stepper, fold=True)

    @contextmanager
    def _scope(self, ts: Tensor | None, stepper: Stepper, fold: bool = False) -> Iterator[Run]:
        check_fixed(stepper)
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
        check_fixed(stepper)
        return self._plan(None if ts is None else check_grid(ts), stepper)

    def _plan(self, ts: Tensor | None, stepper: Stepper) -> Plan:
        assert self.profile is not None
        grid = self.profile.grid if ts is None else ts.detach().double().cpu()
        name = f"{stepper}", grid.numpy().tobytes()
        if name not in self._plans:
            check_fit(self.profile, grid)
            regime = getattr(self.field, "regime", one_network)
            how = (self.reuse, self.correct, self.nfe, self.rtol, regime)
            plan = plan_for(self.profile, grid, stepper, *how)
            promised = plan.promised if self.payload == "output" else math.inf  # rehearsals are of outputs
            self._plans[name] = stepper if " at 0x" in name[0] else None, replace(plan, promised=promised)
        return self._plans[name][1]

    def _begin(self, ts: Tensor | None, stepper: Stepper, fold: bool) -> Run:
        run = Run(self.field, self._rule(ts, stepper), self.key)
        run.sampler, run.once = (ts, stepper, fold), ts is None
        if self._planned():
            plan = self._plan(ts, stepper)
            run.report.expected, run.report.promised = plan.relative_error, plan.promised
            run.report.discretisation, run.report.stable = plan.discretisation, plan.stable
        if fold and ts is not None and self._repays(ts, stepper):
            run.ledger = Folding(stepper, ts)
        self._thread.run, self._thread.report = run, run.report
        return run

    def _script(self, ts: Tensor, stepper: Stepper) -> Script | None:
        """What is to be done on this grid, where all of it is known beforehand."""
        free = self._planned() and self.payload == "output" and not hasattr(self.field, "regime")
        if not free or torch.is_grad_enabled():
            return None
        plan, repays = self.plan(ts, stepper), self._repays(ts, stepper)
        if not (is_constant(stepper) and hasattr(stepper, "__weakref__")):
            return script(stepper, plan, repays, ts)
        name = f"{stepper} {ts.dtype}", ts.double().cpu().numpy().tobytes()
        whose, of, found = self._scripts.get(name, (lambda: None, None, None))
        if whose() is not stepper or of != (plan, repays):
            found = script(stepper, plan, repays, ts)
            self._scripts[name] = weakref.ref(stepper), (plan, repays), found
        return found

    def _planned(self) -> bool:
        return self.tolerance is None and self.criterion is None

    def _repays(self, ts: Tensor, stepper: Stepper) -> bool:
        return self.correct and (not self._planned() or self._plan(ts, stepper).correct)

    def _rule(self, ts: Tensor | None, stepper: Stepper) -> Rule:
        criterion, n, variable = self._criterion(ts, stepper)
        epsilon: Any = math.inf if self.tolerance is None else self.tolerance
        everywhere = epsilon if callable(epsilon) else _everywhere(epsilon)
        gains = None
        if self.unit == "sample" and self.tolerance is not None:
            gains = Gains() if ts is None else Gains(*charges(stepper, ts))
        phi = REUSES[self._plan(ts, stepper).reuse if self._planned() else self.reuse]
        how = VARIABLES[variable], self.norm, self.payload, gains, self.together
        return Rule(criterion, everywhere, n, phi, *how)

    def _criterion(self, ts: Tensor | None, stepper: Stepper) -> tuple[Criterion, float, str]:
        """Who decides, how many reuses in a row it is allowed, and the variable in which outputs are continued."""
        if self.criterion is not None:
            return self.criterion, math.inf if self.max_reuses is None else self.max_reuses, "t"
        if self.tolerance is None:
            plan = self._plan(ts, stepper)
            return Planned(plan), math.inf, plan.variable
        n = self.max_reuses if self.max_reuses is not None else math.inf if self.unit == "sample" else 3
        if self.profile is None:
            return Differences(VARIABLES["t"]), n, "t"
        if ts is not None:
            check_fit(self.profile, ts)
        return Sensitivities(self.profile), n, getattr(self.tolerance, "variable", "t")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_thread", "_plans", "_scripts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _thread=threading.local(), _plans={}, _scripts={})


def _everywhere(tolerance: float) -> Callable[[float], float]:
    return lambda t: tolerance


def check_bare(field: object) -> None:
    """Raise where what is to be measured answers from memory."""
    if isinstance(field, CachedField | Run):
        raise TypeError(
            f"A {type(field).__name__} answers from memory, and that is what would be measured. Give the field itself, "
            f"`.field` of this one."
        )
