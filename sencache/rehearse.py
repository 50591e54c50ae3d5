"""Rehearse plans on fresh samples, so that an error asked for is an error met: split conformal prediction.

What a plan expects knows little of what errors do to later outputs, so it is off, by a factor that differs from field
to field. The factor is measured: R_s = error of sample s / error expected, for S samples that calibration has not seen.
The k-th smallest of them covers a share of further samples that is distributed as Beta(k, S + 1 - k), whatever the
factors are, as long as all are exchangeable: new seeds with new prompts are, new seeds of one prompt are not (Wilks
1941; Vovk et al. 2005). k is the least for which that share is 90 % or more in nine of ten rehearsals, which takes 22
samples; of fewer the largest is taken. A quarter of the samples, up to 8, or an eighth of many teaches plans beforehand
what the field makes of errors, and has no say in what these promise.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from sencache.amplification import run_amplified
from sencache.cache import CachedField, check_bare
from sencache.checks import check_budgets, check_profile
from sencache.influence import influence
from sencache.memory import one_network
from sencache.norms import difference, rms
from sencache.plan import sampler_name
from sencache.profile import SensitivityProfile
from solvers import Euler, Stepper, VelocityField, WhiteNoise, integrate
from solvers.loop import check_grid, check_stepper

EULER = Euler()
TEACHERS = 8  # samples, or an eighth of many
COMPARED = 13  # of the usual budgets, every fourth


def rehearse(
    field: VelocityField,
    profile: SensitivityProfile,
    x: Tensor,
    ts: Tensor,
    stepper: Stepper = EULER,
    *,
    budgets: tuple[int, ...] = (),
    progress: bool = True,
) -> SensitivityProfile:
    """The profile with what plans of `budgets` evaluations made of fresh x (S, ...) at ts[0] on ts (K + 1,).

    With it `CachedField(field, profile, rtol=...)` keeps what it promises, on this grid with this stepper, `plan` says
    what 90 % of samples keep, what is predicted of a reuse is right in the median, and `profile.bound` says how far
    off it may be. A promise is of the plan that was rehearsed: an `rtol` chooses among these, or evaluates everything.
    The first quarter of the samples, 8 at most or an eighth, shows what the field makes of errors, which plans for this
    grid and stepper weigh from then on; the others say what these keep. So give 30 samples or more, in no order. Pays
    for two full runs, and for each of the `budgets` as much as for one, because every reuse is compared with the truth.
    The default budgets are up to 49 from 1/10 to 9/10 of the full run's, of which every fourth is compared and the
    others pay for what they evaluate: 25 full runs on a grid of 50 steps, all in all.

    Raises ValueError for a stepper that asks for several outputs a step, for one whose noise is drawn anew in each run
    (a `BrownianPath` is not), for budgets of which there are no plans, and for a profile that was assumed.
    """
    if isinstance(getattr(stepper, "noise", None), WhiteNoise):
        raise ValueError("Runs with fresh noise cannot be compared: rehearse with a `BrownianPath`, drawn once.")
    check_bare(field)
    check_profile(profile)
    check_stepper(stepper)
    ts = check_grid(ts)
    if type(stepper).__repr__ is object.__repr__:
        raise ValueError(
            f"A rehearsal is of one stepper, known by its `repr`, and {type(stepper).__name__} has none that tells its "
            "options and stays the same: make it a dataclass, or write a `__repr__`."
        )
    steps, times = len(ts) - 1, influence(stepper, ts)[0]
    if len(times) != steps:
        raise ValueError(
            f"{stepper} asks for several outputs a step, of which plans leave some out: use `nfe` with it."
        )
    if "assumed" in profile.facts:
        raise ValueError(
            "An assumed profile expects no error that could be rehearsed: calibrate first, `calibrate(...)`."
        )
    facts = {name: fact for name, fact in profile.facts.items() if name not in ("rehearsed", "rehearsed_ts")}
    profile = replace(profile, budgets=None, expected=None, factors=None, ratios=None, amplified=None, facts=facts)
    answers = getattr(field, "regime", one_network)(times)
    networks = 1 + int((answers[1:] != answers[:-1]).sum())  # each is evaluated once or more
    given = check_budgets(budgets)
    budgets = given or tuple(usual_budgets(steps, networks))
    compared = given or usual_budgets(steps, networks, COMPARED)
    if not networks <= budgets[0] <= budgets[-1] <= steps:
        raise ValueError(f"Rehearse budgets from {networks} to {steps} evaluations; got {budgets}.")
    CachedField(field, profile, nfe=budgets[0]).plan(ts, stepper)  # raises before anything is paid
    paid = [steps if nfe in compared else nfe for nfe in budgets]
    expected, factors, ratios = [], [], []
    with torch.no_grad(), tqdm(total=2 * steps + sum(paid), desc="rehearse", disable=not progress) as bar:
        full, amplified = run_amplified(field, x, ts, stepper)
        facts |= {"rehearsed": sampler_name(stepper, ts), "rehearsed_ts": ts.double().cpu().tolist()}
        first = max(min(TEACHERS, len(x) // 4), len(x) // 8)
        profile = replace(profile, amplified=amplified[:first] if first else None, facts=facts)
        bar.update(2 * steps)
        for nfe, evaluations in zip(budgets, paid, strict=True):
            cached, ratio = CachedField(field, profile, nfe=nfe), times.new_full((len(x), steps), torch.nan)
            try:
                if nfe in compared:
                    end, ratio = _compared(cached, x, ts, stepper)
                else:
                    end = cached.integrate(x, ts, stepper)
            except FloatingPointError:  # so few evaluations lead nowhere
                end = torch.full_like(full, torch.inf)
            error, plan = rms((end - full).double()) / rms(full.double()), cached.plan(ts, stepper)
            expected.append(plan.relative_error if plan.stable else torch.inf)
            factors.append(over(error.cpu(), plan.relative_error)[first:])
            ratios.append(ratio[first:])
            bar.update(evaluations)
    counts, sizes = torch.tensor(budgets, device="cpu"), times.new_tensor(expected)
    return replace(profile, budgets=counts, expected=sizes, factors=torch.stack(factors), ratios=torch.stack(ratios))


def usual_budgets(queries: int, networks: int = 1, most: int = 49) -> list[int]:
    """Up to `most` budgets from 1/10 to 9/10 of a full run's evaluations, in equal ratios, rising.

    Each of the `networks` that take turns is evaluated, and, where it can be, something is left to reuse.
    """
    wanted = {round(queries / 10 * 9 ** (i / (most - 1))) for i in range(most)}
    return sorted({max(networks, min(n, queries - 1)) for n in wanted})


def over(error: Tensor, expected: float) -> Tensor:
    """The factors (S,) of errors and what was expected of them: 0 of no error, infinite where none was expected."""
    return torch.where(error == 0, 0.0, error / expected).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _compared(cached: CachedField, x: Tensor, ts: Tensor, stepper: Stepper) -> tuple[Tensor, Tensor]:
    """The end (S, ...) of a run, and how far off each output was, over the prediction (S, K); NaN at evaluations."""
    errors: list[Tensor] = []
    with cached.following(ts, stepper) as (run, stepper):

        def compared(x: Tensor, t: Tensor) -> Tensor:
            used = run(x, t)
            query = run.report.trace[-1]
            off = rms(difference(cached.field(x, t), used)).double().cpu() if query.reused.any() else query.predicted
            off = off.nan_to_num(nan=torch.inf, posinf=torch.inf)  # of a truth that is no number
            errors.append((off / query.predicted).where(query.reused, torch.nan))
            return used

        return integrate(compared, x, ts, stepper), torch.stack(errors, 1)
