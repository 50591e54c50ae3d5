"""What one rehearsal promises and the next one would have: `python -m benchmarks.rehearsals`.

How closely an error asked for is met depends on who rehearsed, and on whether a plan's limit falls just under that
error or just over it. So many rehearsals are drawn from 384 samples of the shipped SiT, with plans that 32 others have
taught, and each is asked for 60 errors from .05 to .002, on the samples that it left out. Printed, as Markdown, for
rehearsals in which 56, 112 and 224 samples promise: the median of achieved over asked, of all errors asked for, in the
lowest tenth of rehearsals, the middle one and the highest tenth; evaluations; and samples at or under it. Of lengths
up to 34, because what longer ones keep is below the errors asked for. Half an hour on two cores.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.metrics import relative_error
from benchmarks.shipped import GRID, noise, sit_field, sit_profile
from sencache import CachedField
from sencache.amplification import run_amplified
from sencache.conformal import shortest, tolerance_limit
from sencache.plan import sampler_name
from sencache.rehearse import usual_budgets
from solvers import Euler, integrate

TEACHERS, OTHERS, DRAWS = 32, 384, 300
RTOLS = np.geomspace(0.05, 0.002, 60).tolist()


def measured() -> dict[int, Tensor]:
    """The errors (S,) of plans of each length."""
    x, field = noise(8 + TEACHERS + OTHERS, "calibration")[8:], sit_field(TEACHERS + OTHERS)
    teachers, others = torch.arange(TEACHERS), torch.arange(TEACHERS, len(x))
    amplified = run_amplified(field.select(teachers), x[teachers], GRID, Euler())[1]
    facts = {**sit_profile().facts, "rehearsed": sampler_name(Euler(), GRID)}
    profile, field = replace(sit_profile(), amplified=amplified, facts=facts), field.select(others)
    full, lengths = integrate(field, x[others], GRID), [n for n in usual_budgets(len(GRID) - 1) if n <= 34]
    ends = ((nfe, CachedField(field, profile, nfe=nfe).integrate(x[others], GRID)) for nfe in lengths)
    return {nfe: relative_error(end, full).double() for nfe, end in ends}


def asked(errors: dict[int, Tensor], promising: Tensor, new: Tensor) -> list[tuple[float, int, float]]:
    """Achieved over asked, evaluations and the share of samples that keep it, of each error asked for."""
    limits = {nfe: tolerance_limit(each[promising], 0.9) for nfe, each in errors.items()}
    found = []
    for rtol in RTOLS:
        nfe = shortest(limits, rtol)
        each = errors[nfe][new] if nfe else torch.zeros(1)
        found.append((float(each.median()) / rtol, nfe or len(GRID) - 1, float((each <= rtol).double().mean())))
    return found


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    errors, generator = measured(), torch.Generator().manual_seed(0)
    print("| samples that promise | achieved / asked, median | evaluations, mean | samples at or under it, mean |")
    print("|---|---|---|---|")
    for count in (56, 112, 224):
        orders = [torch.randperm(OTHERS, generator=generator) for _ in range(DRAWS)]
        drawn = np.array([asked(errors, order[:count], order[count:]) for order in orders])  # (draws, rtols, 3)
        low, middle, high = np.quantile(np.median(drawn[..., 0], 1), [0.1, 0.5, 0.9])
        spent, kept = drawn[..., 1].mean(), drawn[..., 2].mean()
        print(f"| {count} | {low:.2f}, {middle:.2f}, {high:.2f} | {spent:.1f} | {kept:.1%} |")
