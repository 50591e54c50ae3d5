"""An assumed profile is what calibration measures on such data, and its plans are worth having on others."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import lognorm

from benchmarks.fields.gmm import GaussianMixture
from benchmarks.shipped import FIELDS
from sencache import CachedField, SensitivityProfile, assumed, calibrate, rehearse
from sencache.command import main
from solvers import (
    VP,
    BrownianPath,
    Cosine,
    DPMSolverPP,
    Euler,
    EulerMaruyama,
    Heun,
    Linear,
    Tabulated,
    UniPC,
    grids,
    integrate,
)
from tests.flows import GaussianFlow, rms

TABLE = Tabulated(torch.linspace(1, 1e-3, 1001, dtype=torch.float64)[1:] ** 2)
SCALES = torch.from_numpy(lognorm(s=1.5, scale=0.2).ppf((np.arange(256) + 0.5) / 256))
PATHS = {
    "linear": (Linear(), 1.0, 0.0),
    "linear, data at 1": (Linear(data_at=1.0), 0.0, 1.0),
    "cosine": (Cosine(), 1.0, 0.0),
    "VP": (VP(), 1.0, 1e-3),
    "table": (TABLE, 1.0, 0.0),
}


@pytest.mark.parametrize("name", PATHS)
def test_it_is_what_calibration_measures_on_gaussian_data(name):
    path, start, end = PATHS[name]
    ts = grids.uniform(800, start, end).double()
    flow = GaussianFlow(path, mean=0.0, std=SCALES)
    x_T = flow.moments(ts[0])[1][None]  # one deviation off in every direction
    measured, told = calibrate(flow, x_T, ts, progress=False), assumed(path, ts)
    assert torch.equal(told.t, measured.t)
    few = slice(0, 700, 50)  # where Euler's own steps are short beside the scales
    size = measured.gram[0].diagonal().sqrt()
    off = (told.gram - measured.gram)[0].abs() / (size * size[:, None])
    assert off[few, few].max() < 0.03
    assert torch.allclose(told.alpha_x[few], measured.alpha_x[few], rtol=0.1)
    assert told.direction == measured.direction


def test_time_may_run_either_way():
    ts = grids.shifted(50, 3.0)
    down, up = assumed(Linear(), ts), assumed(Linear(data_at=1.0), 1 - ts)
    assert torch.allclose(down.gram, up.gram)
    plans = [CachedField(lambda x, t: x, each, nfe=12).plan() for each in (down, up)]
    assert plans[0].nodes.tolist() == plans[1].nodes.tolist()


@pytest.mark.parametrize("nfe", [25, 15, 10])
@pytest.mark.parametrize("name", ["linear", "VP", "VP logarithmic"])
@pytest.mark.parametrize("method", ["Euler", "UniPC"])
def test_its_plans_spend_their_budget_and_beat_fewer_steps_on_data_of_another_kind(name, method, nfe):
    path = Linear() if name == "linear" else VP()

    def grid(steps):
        if name == "VP logarithmic":
            return grids.logarithmic(steps, 1.0, 1e-3)
        return grids.uniform(steps, 1.0, 0.0 if name == "linear" else 1e-3)

    field, stepper = (
        GaussianMixture.load(FIELDS / "gmm.safetensors", path),
        UniPC(path) if method == "UniPC" else Euler(),
    )
    x = torch.randn(24, 256, generator=torch.Generator().manual_seed(5))
    full = integrate(field, x, grid(50), stepper)
    cached = CachedField(field, assumed(path, grid(50)), nfe=nfe)
    ours = rms(cached.integrate(x, grid(50), stepper) - full)
    assert (cached.report.evaluations == nfe).all()
    assert ours.median() < 0.6 * rms(integrate(field, x, grid(nfe), stepper) - full).median()
    assert math.isnan(cached.report.expected)  # how rough the field is nobody knows
    assert "expected" not in str(cached.report)


@pytest.mark.parametrize("method", ["Heun", "DDIM", "DPM-Solver++", "Euler-Maruyama"])
def test_every_stepper_takes_its_plans(method):
    path, ts = Linear(), grids.uniform(30)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = BrownianPath(x, ts, torch.Generator().manual_seed(2))
    steppers = {
        "Heun": Heun(),
        "DDIM": DPMSolverPP(path, order=1),
        "DPM-Solver++": DPMSolverPP(path),
        "Euler-Maruyama": EulerMaruyama(path, noise),
    }
    cached = CachedField(GaussianFlow(path), assumed(path, ts), nfe=11)
    assert cached.integrate(x, ts, steppers[method]).isfinite().all()
    assert (cached.report.evaluations == 11).all()


def test_it_can_be_saved_and_has_no_error_to_rehearse(tmp_path):
    ts, field = grids.uniform(40), GaussianFlow(Linear())
    assumed(Linear(), ts).save(tmp_path / "assumed.safetensors")
    profile = SensitivityProfile.load(tmp_path / "assumed.safetensors")
    plans = [CachedField(field, each, nfe=9).plan() for each in (profile, assumed(Linear(), ts))]
    assert torch.equal(plans[0].nodes, plans[1].nodes)
    with pytest.raises(ValueError, match="calibrate first"):
        rehearse(field, profile, torch.randn(4, 8), ts)
    with pytest.raises(ValueError, match="rehearsed"):
        CachedField(field, profile, rtol=0.02)


def test_under_a_tolerance_nothing_is_known_and_everything_evaluated():
    ts = grids.uniform(12)
    cached = CachedField(GaussianFlow(Linear()), assumed(Linear(), ts), tolerance=1e9)
    cached.integrate(torch.randn(2, 8), ts)
    assert not cached.report.reuses.any()


def test_a_path_that_is_not_finite_on_the_grid_is_refused():
    with pytest.raises(ValueError, match=r"not finite at t = 0, and .* Leave that end of time out"):
        assumed(VP(), grids.uniform(10, 0.0, 1.0))
    with pytest.raises(ValueError, match=r"not finite at t = 1, and .* is `data_at` the other end"):
        assumed(VP(data_at=1.0), grids.uniform(10, 1.0, 0.0))
    assumed(VP(), grids.uniform(10, 1.0, 0.0))  # at the end alone nothing is asked


def test_a_grid_in_another_unit_of_time_is_refused():
    with pytest.raises(ValueError, match="runs from 0 to 1; got a grid from 1000 to 0"):
        assumed(Linear(), grids.uniform(10, 1000.0, 0.0))
    with pytest.raises(ValueError, match="runs from 0 to 1; got a grid from 1 to -1"):
        assumed(Linear(), grids.uniform(10, 1.0, -1.0))


class OnDisk:
    """A field whose `path` is something else."""

    path = "weights.safetensors"

    def __call__(self, x, t):
        return -x


@pytest.mark.parametrize("path", [Linear, "linear", grids.uniform(4)])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(TypeError, match=r"Expected a path, such as `Linear\(\)`"):
        assumed(path, grids.uniform(4))


def test_a_field_that_is_on_another_path_is_refused():
    ts = grids.uniform(10, 1.0, 0.1)
    with pytest.raises(ValueError, match=r"assumed on Linear\(data_at=0.0\), and this field is on VP"):
        CachedField(GaussianFlow(VP()), assumed(Linear(), ts), nfe=4)
    CachedField(GaussianFlow(VP()), assumed(VP(), ts), nfe=4)
    CachedField(GaussianFlow(Linear(data_at=0)), assumed(Linear(), ts), nfe=4)
    CachedField(lambda x, t: -x, assumed(Linear(), ts), nfe=4)
    CachedField(OnDisk(), assumed(Linear(), ts), nfe=4)


def test_what_is_shown_of_it_claims_no_error(tmp_path, capsys):
    assumed(Linear(), grids.uniform(30)).save(tmp_path / "a.safetensors")
    main(["show", str(tmp_path / "a.safetensors"), "--nfe", "5", "10", "--plot", str(tmp_path / "a.png")])
    said = capsys.readouterr().out
    assert "nan" not in said
    assert "expected error" not in said
    assert "nothing measured" in said
    assert "nfe=5: 1, " in said
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_grids_may_be_of_any_precision(dtype):
    ts = grids.uniform(8).to(dtype).requires_grad_()
    profile = assumed(Linear(), ts)
    cached = CachedField(lambda x, t: -x, profile, nfe=3)
    cached.integrate(torch.randn(2, 8, dtype=torch.float64), ts.detach())
    assert (cached.report.evaluations == 3).all()
    assert torch.equal(profile.gram, assumed(Linear(), ts.detach().double()).gram)
