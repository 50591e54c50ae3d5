"""What the library keeps for itself stays where it is under `torch.set_default_device`.

Tensors on "meta" hold no numbers: whatever were made on the default device would break there at first use, as on a GPU
it would meet others on the CPU.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from sencache import CachedField, SensitivityProfile, assumed, calibrate, planned_tolerance, rehearse
from sencache.baselines import MagCache, lemica, magnitude_ratios, segment_errors, uniform
from solvers import VP, DPMSolverPP, Euler, Heun, Linear, Tabulated, UniPC, grids, integrate

TS = grids.uniform(20, 0.95, 0.05)
X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TABLE = torch.linspace(0.99, 0.01, 100, dtype=torch.float64)


def field(x, t):
    return torch.sin(2 * x + 3 * t) - x


PROFILE = calibrate(field, X, TS, progress=False)
REHEARSED = rehearse(field, PROFILE, X, TS, budgets=(5, 8))


def sampled(stepper=None, ts=TS, **options):
    return CachedField(field, **{"profile": PROFILE} | options).integrate(X, ts, stepper or Euler())


def in_a_loop(**options):
    cached, x = CachedField(field, PROFILE, **options), X
    with cached.run(TS):
        for t, t_next in pairwise(TS):
            x = x + (t_next - t) * cached(x, t)
    return x


def saved(folder):
    REHEARSED.save(folder / "p.safetensors")
    return SensitivityProfile.load(folder / "p.safetensors").gram


USES = {
    "Heun": lambda _: sampled(Heun(), nfe=8),
    "DPM-Solver++": lambda _: sampled(DPMSolverPP(Linear()), nfe=8),
    "UniPC": lambda _: sampled(UniPC(Linear()), nfe=8),
    "plain UniPC": lambda _: integrate(field, X, TS, UniPC(VP())),
    "nfe": lambda _: sampled(nfe=8),
    "rtol": lambda _: sampled(profile=REHEARSED, rtol=0.5),
    "tolerance": lambda _: sampled(tolerance=0.1),
    "sample": lambda _: sampled(tolerance=0.1, unit="sample"),
    "rule": lambda _: sampled(tolerance=0.1, max_reuses=3, reuse="hold"),
    "own differences": lambda _: sampled(profile=None, tolerance=0.1),
    "assumed": lambda _: sampled(profile=assumed(Linear(), TS), nfe=8),
    "loop": lambda _: in_a_loop(nfe=8),
    "calibrate": lambda _: calibrate(field, X, TS, progress=False).gram,
    "on data": lambda _: calibrate(field, X, TS, path=Linear(), progress=False).alpha_x,
    "rehearse": lambda _: rehearse(field, PROFILE, X, TS, budgets=(5, 8)).factors,
    "ε(t)": lambda _: torch.tensor(
        [planned_tolerance(CachedField(field, PROFILE, nfe=8).plan(TS), PROFILE)(t) for t in TS[:-1].tolist()],
        device="cpu",
    ),
    "save": saved,
    "lists": lambda _: integrate(field, X, [0.9, 0.5, 0.1]),
    "tabulated": lambda _: integrate(field, X, TS, DPMSolverPP(Tabulated(TABLE))),
    "uniform": lambda _: sampled(profile=None, criterion=uniform(TS, 8)),
    "LeMiCa": lambda _: sampled(
        profile=None, criterion=lemica(segment_errors(field, X[:1], TS, payload="output", progress=False), TS, 8)
    ),
    "MagCache": lambda _: sampled(
        profile=None, criterion=MagCache(magnitude_ratios(field, X, TS, payload="output"), TS), tolerance=0.1
    ),
    "grids": lambda _: torch.cat(
        [
            grids.uniform(5),
            grids.shifted(5, 3.0),
            grids.logarithmic(5),
            grids.log_snr(5, Linear()),
            grids.karras(5, VP()),
            grids.through(TS[:4], 0.0),
        ]
    ),
}


@pytest.mark.parametrize("name", USES)
def test_nothing_is_made_on_the_default_device(name, tmp_path):
    known = USES[name](tmp_path)
    with torch.device("meta"):
        found = USES[name](tmp_path)
    assert found.device.type == "cpu"
    assert torch.equal(found, known) or torch.allclose(found, known, equal_nan=True, rtol=0, atol=0)
