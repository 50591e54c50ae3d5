"""Where to evaluate, and what to expect of it: the best schedule of a given length on the outputs' Gram matrix.

What a schedule will do to the sample is known before it is run. The outputs f_j along a few full trajectories were
kept as their inner products G_ij = <f_i, f_j> / d; a reuse, a correction and a step are all linear in outputs; so the
error that a schedule leaves in the final state is a vector w of weights of the f_j, and its size is sqrt(w^T G w).
It falls apart into one term a gap, which depends on the gap's two ends and, where outputs are extrapolated, on the
evaluation before: a shortest path over pairs of evaluations (`schedule.py`) finds the best schedule, as far as gaps go
each alone. From there single evaluations are moved to where the whole is expected to do better (`expected.py`).

What an error in the state does to the next output is known by its size only, ||J_x|| times the error (Eq. 11), and is
added as if it were independent of the rest; without sensitivities it is left out. Gaps so long that errors would grow
from one to the next are avoided, and where the budget leaves no others, the error expected is large.

Shapes: T query times of the grid; S calibration samples; gram (S, T, T); N evaluations.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sencache.amplification import carried
from sencache.batch import Array
from sencache.discretisation import discretisation
from sencache.expected import Errors
from sencache.influence import influence, response
from sencache.memory import Regime, one_network
from sencache.profile import SensitivityProfile
from sencache.reuse import VARIABLES
from sencache.schedule import HEARD, Problem, quadratic, schedules
from solvers import Stepper


@dataclass(frozen=True, eq=False)
class Plan:
    """The times at which to evaluate, and what is expected of the rest."""

    times: Tensor  # (T,) float64, all query times of the grid, in order
    nodes: Tensor  # (N,) int64, which of them are evaluated
    reuse: str
    variable: str  # in which outputs are continued and interpolated
    correct: bool
    change: Tensor  # (T,) expected RMS error of each reused output; 0 at the nodes
    difference: Tensor  # (T,) expected RMS difference of the last two evaluations before each output; NaN without two
    error: Tensor  # (S,) expected RMS error of the final state, of each calibration sample
    relative_error: float  # its median, over the RMS of that state; NaN where that is not all of it
    stable: bool = True  # whether errors are not known to grow: `Errors.rank`
    promised: float = torch.inf  # the relative error that 90 % of samples keep, once plans were rehearsed
    discretisation: float = torch.nan  # the full run's own relative error against the ODE's solution, where known

    @property
    def direction(self) -> int:
        """The sign of dt along the grid."""
        return self.stops.direction

    def predicted(self, t_ref: Array, t: Array) -> tuple[Array, Array]:
        """The expected error (B,) of a reuse at t of what was evaluated at t_ref, infinite if a node lies between.

        And the difference (B,) of the two evaluations before it that goes with this expectation.
        """
        nearest = abs(self.stops.times - t[:, None]).argmin(1)
        change = np.where(self.stops.between(t_ref, t), np.inf, self.change.numpy()[nearest])
        return change, self.difference.numpy()[nearest]

    @cached_property
    def stops(self) -> Stops:
        return Stops(self.times, self.nodes)


class Stops:
    """The nodes (N,) among the query times (T,) of a grid, as something that a sampler comes to."""

    def __init__(self, times: Tensor, nodes: Tensor):
        self.times: Array = times.numpy()
        self.direction = 1 if self.times[-1] > self.times[0] else -1
        self.slack = abs(np.diff(self.times)).min() / 2 if len(self.times) > 1 else 0.0
        self.earliest, self.latest = self.times.min() - self.slack, self.times.max() + self.slack
        self.due = self.times[nodes.numpy()] * self.direction  # rising

    def between(self, t_ref: Array, t: Array) -> Array:
        """Whether one of them has come since t_ref (B,), or t (B,) is not on the grid at all."""
        now = np.array([t, t_ref]) * self.direction + self.slack
        passed, before = self.due.searchsorted(now, "right")
        return (passed > before) | (t < self.earliest) | (t > self.latest)


def expectation(problem: Problem, nodes: Array, size: float, errors: Errors | None = None) -> Plan:
    """What is to be expected of evaluating at the query times `nodes` (N,), for a final state of RMS `size`."""
    errors = errors or Errors(problem)
    error, stable = torch.from_numpy(np.sqrt(errors.of(nodes))), not errors.rank(nodes)[0]
    known = torch.from_numpy(problem.times), torch.from_numpy(nodes), problem.reuse, problem.variable, problem.correct
    return Plan(*known, *_changes(problem, nodes), error, float(error.median() / size), stable)


def _changes(problem: Problem, nodes: Array) -> tuple[Tensor, Tensor]:
    """The expected RMS error (T,) of each reused output, and RMS difference (T,) of the two evaluations before it.

    Medians over the calibration samples, as a prediction of one should be.
    """
    s, j = VARIABLES[problem.variable](problem.times), np.arange(len(problem.times))
    which = nodes.searchsorted(j, "right") - 1
    ref, before = nodes[which], nodes[np.maximum(which - 1, 0)]
    known = (which > 0) & problem.together(before, ref)
    phi = problem.phi(s, s[ref], np.where(known, s[before], np.nan))
    error, apart = np.zeros((2, len(j), len(j)))
    error[j, j] += 1
    error[j, ref] -= 1 + phi
    error[j, before] += phi
    apart[j, ref] += 1
    apart[j, before] -= 1
    change, difference = (
        torch.from_numpy(np.sqrt(quadratic(weights, problem.gram))).median(0).values for weights in (error, apart)
    )
    return change, difference.where(torch.from_numpy(known), torch.nan)


def sampler_name(stepper: Stepper, ts: Tensor) -> str:
    """Tells samplers apart: the stepper, and the grid in words and by its digest."""
    kind = b"weighed on the way" if response(stepper, ts).mixed else b"weighed"  # each kind of plans is rehearsed anew
    digest = hashlib.sha256(b"a tenth grown, " + kind + ts.double().cpu().numpy().tobytes()).hexdigest()[:8]
    return f"{stepper}, {len(ts) - 1} steps from {ts[0]:g} to {ts[-1]:g} ({digest})"


def plan_for(
    profile: SensitivityProfile,
    ts: Tensor,
    stepper: Stepper,
    reuse: str,
    correct: bool,
    nfe: int | None = None,
    rtol: float | None = None,
    regime: Regime = one_network,
) -> Plan:
    """The best plan of `nfe` evaluations on ts (K + 1,), by default half of them, or the shortest seen to keep `rtol`.

    Of the several outputs that Heun and its like ask for at one time, a plan evaluates the first and reuses it for the
    others; what that does to the sample nobody has measured, and no relative error is told. The output at the grid's
    end, which only they ask for, is the last calibrated one where calibration was not of such a stepper.
    Where `regime` changes, another network takes over: its first time is evaluated, and nothing is carried across.
    The variable in which outputs are continued is the one in which the plan is expected to do better, by the geometric
    mean over the samples.

    Where every step adds noise, the search leaves echoes out, because the noise moves later outputs more than any debt
    does. Then, and where the profile is assumed, it stops at the shortest path, because how errors cancel is not known
    (the search for that hears all of an echo); and where outputs are held, which gained nothing from more.
    Where errors can grow under every plan, one that holds and repays nothing is taken if they grow less under that:
    holding allows the longest gaps. An `rtol` takes no plan under which errors can grow.
    """
    if (rehearsed := _as_rehearsed(profile, ts)) is not None:
        plan = plan_for(profile, rehearsed, stepper, reuse, correct, nfe, rtol, regime)
        return replace(plan, times=influence(stepper, ts)[0])
    found = response(stepper, ts)
    times = found.times
    unknown = times[~profile.near(times)]
    if len(unknown):
        raise ValueError(
            f"The profile was measured from t = {profile.t[0]:g} to {profile.t[-1]:g}, and {len(unknown)} outputs of "
            f"this grid are asked for outside of that, such as at {unknown[0]:g}, of which a plan would know nothing. "
            "Calibrate on this grid; or give `tolerance`, under which what is not known is evaluated."
        )
    if nfe is not None and nfe > len(times):
        raise ValueError(f"`nfe` is {nfe}, and {stepper} asks for only {len(times)} outputs on this grid.")
    answers = regime(times)
    part = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), (answers[1:] != answers[:-1]).cumsum(0)])
    heard = 0.0 if hasattr(stepper, "noise") else HEARD
    states = found.states if found.mixed else None
    how = part, sampler_name(stepper, ts), reuse, correct, nfe, rtol, heard, states
    plan = best_plan(profile, times, found.gain, *how)
    if (found.counts > 1).any():  # one output answers for several, and nobody knows what that does
        plan = replace(plan, relative_error=torch.nan)
    if part.any():
        return plan
    return replace(plan, discretisation=discretisation(profile, ts, stepper, times, found.gain))


def _as_rehearsed(profile: SensitivityProfile, ts: Tensor) -> Tensor | None:
    """The grid (K + 1,) that plans were rehearsed on, where ts is that in another precision or from another machine.

    To a thousandth of its steps; None where it is that very grid, or another. Plans made on it are the same, ties too.
    """
    ts = ts.double().cpu()
    known = ts.new_tensor(profile.facts.get("rehearsed_ts", []))
    if known.shape != ts.shape or torch.equal(known, ts):
        return None
    steps = known.diff().abs()
    nearest = torch.minimum(torch.cat([steps[:1], steps]), torch.cat([steps, steps[-1:]]))
    return known if ((known - ts).abs() <= 1e-3 * nearest).all() else None


def _felt(profile: SensitivityProfile, alpha: Tensor, times: Tensor) -> Array:
    """||J_x|| at the query times (T,), from `alpha` at the calibrated ones; 0 where it was not measured."""
    order = profile.t.argsort()
    known = alpha[order].nan_to_num(nan=torch.inf, posinf=torch.inf)
    found = np.interp(times.numpy(), profile.t[order].numpy(), known.numpy())
    return np.nan_to_num(found, posinf=0.0)


def best_plan(
    profile: SensitivityProfile,
    times: Tensor,
    gain: Tensor,
    part: Tensor,
    sampler: str,
    reuse: str,
    correct: bool,
    nfe: int | None,
    rtol: float | None,
    heard: float = HEARD,
    states: Tensor | None = None,
) -> Plan:
    """`plan_for` a sampler known by its query times, dx_K / dv_j, the network that answers, each (T,), and its name.

    states: (T, T) how those on the way weigh outputs, `Response.states`, if otherwise than the end.
    """
    logarithm = "log t" if profile.direction < 0 else "log(1 - t)"
    networks = int(part[-1]) + 1
    if nfe is not None and nfe < networks:
        raise ValueError(f"`nfe` is {nfe}, and {networks} networks take turns on this grid, each asked once or more.")
    gram = profile.gram_at(times)
    each = profile.alpha_x[None] if profile.samples_x is None else profile.samples_x
    alpha_x, *samples_x = (_felt(profile, alpha, times) for alpha in (profile.alpha_x, *each))
    rehearsed = profile.facts.get("rehearsed")
    amplified = profile.amplified if rehearsed == sampler else None
    known = {"gain": gain.numpy(), "gram": gram.numpy(), "part": part.numpy()}
    known |= {} if states is None else {"states": states.numpy()}
    known |= {"alpha_x": alpha_x, "samples_x": np.stack(samples_x), "carried": carried(amplified)}
    assumed = "assumed" in profile.facts
    polishes = heard > 0 and reuse != "hold" and not assumed  # it is known how errors cancel
    heard = 1.0 if heard and assumed else heard  # what is not polished is found with all of their weight
    in_t = Problem(times.numpy(), reuse=reuse, variable="t", correct=correct, heard=heard, **known)
    s = VARIABLES[logarithm](in_t.times)
    monotone = (np.diff(s) > 0).all() or (np.diff(s) < 0).all()  # not on a grid that passes the data
    problems = [in_t, *([replace(in_t, variable=logarithm)] if monotone else [])]
    if rtol is not None:
        if rehearsed != sampler:
            raise ValueError(f"`rtol` was rehearsed with {rehearsed}; got {sampler}. Rehearse that, or use `nfe`.")
        nfe = profile.shortest(rtol) or len(times)
    n = nfe or max(networks, -(-len(times) // 2))
    ways = []
    for problem in problems:
        errors, nodes = Errors(problem), schedules(problem, n)[-1] if n < len(times) else np.arange(n)
        ways.append((errors, errors.polished(nodes) if polishes else nodes))
    ranks = [errors.rank(nodes) for errors, nodes in ways]
    if all(grows for grows, *_ in ranks) and amplified is not None:  # weights can lead there
        how = part, sampler, reuse, correct, nfe, rtol, heard, states
        return best_plan(replace(profile, amplified=None), times, gain, *how)
    if all(grows for grows, *_ in ranks):
        held = Errors(replace(in_t, reuse="hold", correct=False))  # it bears the longest gaps
        ways.append((held, schedules(held.problem, n)[-1]))
        ranks.append(held.rank(ways[-1][1]))
    errors, nodes = ways[ranks.index(min(ranks))]
    size = float(profile.size.median()) if profile.size is not None else math.nan
    plan = expectation(replace(errors.problem, carried=carried(None)), nodes, size)
    if rehearsed != sampler or profile.factors is None or reuse != "linear" or not correct:
        return plan
    promised = profile.promise(n, plan.relative_error) if n < len(times) else 0.0
    return replace(plan, change=plan.change * profile.typical(n), promised=promised)
