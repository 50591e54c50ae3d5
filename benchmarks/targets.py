"""Errors asked for and errors met on a trained field, and every reuse's error beside its prediction.

    python -m benchmarks.targets [--field sit] [--samples 256] [--rehearsed 256]

`rehearse` on samples of the calibration seeds, everything else on the reported ones. Prints, as Markdown: what
rehearsal found, the limits of plans and what is made of errors; for each `rtol` the evaluations spent, the share of
samples at or under it and the median of achieved over asked; for each budget how far the errors of samples spread, and
what a sample could have known of its own; and how the predicted error of a reuse compares with the true one, evaluated
for the purpose. An hour on one core for the SiT, and as much for a video model with 64 and 64.
"""

from __future__ import annotations

import argparse
from itertools import pairwise

import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.cases import Case, cases
from benchmarks.metrics import relative_error
from benchmarks.sweep import settings
from sencache import CachedField, SensitivityProfile, calibrate, rehearse, rms
from solvers import Euler, Stepper, integrate


def predictions(cached: CachedField, x: Tensor, ts: Tensor, stepper: Stepper) -> str:
    """A line's cells: predicted, observed and true errors of the reuses of a plan."""
    field, profile, nfe, true = cached.field, cached.profile, cached.nfe, []
    assert profile is not None
    assert nfe is not None
    with cached.following(ts, stepper) as (run, stepper):

        def compared(x: Tensor, t: Tensor) -> Tensor:
            used = run(x, t)
            if run.report.trace[-1].reused.any():
                true.append(rms(field(x, t) - used).double().cpu())
            return used

        integrate(compared, x, ts, stepper)
    reuses = [query for query in run.report.trace if query.reused.any()]
    error = torch.stack(true)
    predicted, observed = (
        torch.stack([getattr(query, name) for query in reuses]) for name in ("predicted", "observed")
    )
    decisions = (error <= profile.bound(nfe, 0.95) * predicted).double().mean()
    wholes = (error <= profile.bound(nfe, 0.9, whole=True) * predicted).all(0).double().mean()
    rank, seen = spearmanr(predicted.flatten(), error.flatten()).statistic, observed.isfinite()
    ratios = (predicted / error).median(), (observed / error)[seen].median()
    return f"{ratios[0]:.2f} | {rank:.2f} | {decisions:.1%} | {wholes:.1%} | {ratios[1]:.2f} |"


def spread(cached: CachedField, x: Tensor, ts: Tensor, stepper: Stepper) -> str:
    """A line's cells: final errors in the worst decile over the median, and how the run itself ranked them.

    The same of the errors it makes itself, where evaluations return what the full run's did and the field makes nothing
    of them. Ranked by the sum of step times observed error of its reuses; and by that of ||dy|| / ||dx|| |dt| between
    evaluations, the sample's own integral of ||J_x|| along the velocity, to the end and in the first half.
    """
    outputs: dict[float, Tensor] = {}

    def kept(x: Tensor, t: Tensor) -> Tensor:
        return outputs.setdefault(float(t), cached.field(x, t))

    full = integrate(kept, x, ts, stepper)
    replayed = CachedField(lambda x, t: outputs[float(t)], cached.profile, nfe=cached.nfe)
    made = relative_error(replayed.integrate(x, ts, stepper), full).double()
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    with cached.following(ts, stepper) as (run, stepper):

        def watched(x: Tensor, t: Tensor) -> Tensor:
            y = run(x, t)
            if not run.report.trace[-1].reused.any():
                seen.append((x, y, t))
            return y

        error = relative_error(integrate(watched, x, ts, stepper), full).double()
    observed = torch.stack([query.observed for query in cached.report.trace], 1).nan_to_num(0.0) * ts.diff().abs()
    pairs = pairwise(seen)
    secants = torch.stack([rms(y - y_r) / rms(x - x_r) * abs(t - t_r) for (x_r, y_r, t_r), (x, y, t) in pairs], 1)
    early = sum(bool(t >= ts[len(ts) // 2]) for *_, t in seen[1:])
    shown = observed.sum(1), secants.sum(1), secants[:, :early].sum(1)
    ranks = " | ".join(f"{spearmanr(error, one).statistic:.2f}" for one in shown)
    spreads = " | ".join(f"{each.quantile(0.9) / each.median():.2f}" for each in (error, made))
    return f"{spreads} | {ranks} |"


def rehearsed(case: Case, samples: int) -> SensitivityProfile:
    """The shipped profile after a rehearsal with samples of the calibration seeds that calibration has not seen."""
    field, x, _ = case.samples(8 + samples, "calibration")
    return rehearse(field.select(torch.arange(8, len(x))), case.profile, x[8:], case.grid(), case.stepper)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--field", choices=cases(), default="sit", help="default: sit")
    parser.add_argument("--samples", type=int, default=256, help="how many samples to report on (default 256)")
    parser.add_argument("--rehearsed", type=int, default=256, help="how many samples to rehearse with (default 256)")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    case = cases()[options.field]
    ts, stepper, profile = case.grid(), case.stepper, rehearsed(case, options.rehearsed)
    assert profile.budgets is not None
    assert profile.factors is not None
    assert profile.amplified is not None
    print("| evaluations | error / expected: median | limit for 90 % |\n|---|---|---|")
    for budget, factors in zip(profile.budgets.tolist(), profile.factors, strict=True):
        print(f"| {budget} | {factors.median():.2f} | {profile.factor(budget):.2f} |")
    print("\n| errors made at t | are larger in the end by: median | worst decile |\n|---|---|---|")
    for t, each in zip(ts[2:-1:6].tolist(), profile.amplified.T[2::6], strict=True):
        print(f"| {t:.2f} | {each.median():.2f} | {each.quantile(0.9):.2f} |")
    field, x, _ = case.samples(options.samples, "reported")
    full = integrate(field, x, ts, stepper)
    print("\n| `rtol` | evaluations | samples at or under it | achieved / asked, median |\n|---|---|---|---|")
    for rtol in (0.05, 0.03, 0.02, 0.01, 0.007, 0.005, 0.003, 0.002):
        cached = CachedField(field, profile, rtol=rtol)
        error = relative_error(cached.integrate(x, ts, stepper), full)
        spent, kept = int(cached.report.evaluations.max()), (error <= rtol).double().mean()
        print(f"| {rtol} | {spent} | {kept:.0%} | {error.median() / rtol:.2f} |", flush=True)
    print(
        "\n| field, evaluations | worst decile / median | of the errors made | rank correlation with own reuses | "
        "own secants | of the first half |"
    )
    print("|---|---|---|---|---|---|")
    for nfe in (25, 20, 15, 10):
        print(f"| {case.name}, {nfe} | {spread(CachedField(field, profile, nfe=nfe), x, ts, stepper)}", flush=True)
    mixture = next(setting for setting in settings() if setting.name == "mixture, linear path")
    mixed, start, even = mixture.field(options.samples), mixture.start(options.samples, "reported"), mixture.grid(50)
    known = calibrate(mixture.field(8), mixture.start(8, "calibration"), even, progress=False)
    for nfe in (25, 20, 15, 10):
        print(f"| mixture, {nfe} | {spread(CachedField(mixed, known, nfe=nfe), start, even, Euler())}", flush=True)
    print(
        "\n| evaluations | predicted / true, median | rank correlation | reuses within their 95 % bound | "
        "trajectories wholly within their 90 % bound | observed / true, median |\n|---|---|---|---|---|---|"
    )
    for nfe in (25, 20, 15, 10):
        print(f"| {nfe} | {predictions(CachedField(field, profile, nfe=nfe), x, ts, stepper)}", flush=True)
