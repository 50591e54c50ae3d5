"""An error that was asked for is met, by the share of samples that rehearsal promises."""

import pytest
import torch

from benchmarks.fields.gmm import GaussianMixture
from sencache import CachedField, SensitivityProfile, calibrate, rehearse, rms
from solvers import Linear, grids, integrate

FIELD = GaussianMixture.load("benchmarks/fields/gmm.safetensors", Linear())
TS = grids.uniform(40)


def noise(samples, seed):
    return torch.randn(samples, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def profile():
    return rehearse(FIELD, calibrate(FIELD, noise(8, 0), TS, progress=False), noise(40, 1), TS)


@pytest.mark.parametrize("rtol", [0.03, 0.01, 0.003])
def test_nine_of_ten_new_samples_are_within_what_was_asked(profile, rtol):
    cached, x = CachedField(FIELD, profile, rtol=rtol), noise(128, 2)
    full = integrate(FIELD, x, TS)
    error = rms(cached.integrate(x, TS) - full) / rms(full)
    # 128 samples at 90 %, and 40 rehearsed ones: four standard errors of both together
    assert (error <= rtol).double().mean() > 0.9 - 4 * (0.09 / 128 + 0.09 / 42) ** 0.5
    assert cached.report.evaluations.max() < 40


def test_asking_for_less_error_never_costs_less(profile):
    spent = [len(CachedField(FIELD, profile, rtol=rtol).plan(TS).nodes) for rtol in (0.1, 0.03, 0.01, 0.003, 1e-9)]
    assert spent == sorted(spent)
    assert spent[-1] == 40


def test_a_factor_is_the_conformal_quantile_of_errors_over_expected_errors(profile):
    x, full = noise(40, 1), integrate(FIELD, noise(40, 1), TS)
    for budget, factors in zip(profile.budgets.tolist(), profile.factors, strict=True):
        cached = CachedField(FIELD, profile, nfe=budget)
        error = rms(cached.integrate(x, TS) - full).double() / rms(full).double()
        assert torch.allclose(factors, error / cached.plan(TS).relative_error)
        assert profile.factor(budget) == factors.sort().values[36]  # the 37th of 40: ceil(.9 * 41)


def test_below_the_least_rehearsed_budget_nothing_is_promised(profile):
    assert profile.factor(int(profile.budgets[0]) - 1) == torch.inf
    assert len(CachedField(FIELD, profile, rtol=1e9).plan(TS).nodes) == profile.budgets[0]


def test_what_was_rehearsed_is_saved(profile, tmp_path):
    profile.save(tmp_path / "p.safetensors")
    again = SensitivityProfile.load(tmp_path / "p.safetensors")
    assert torch.equal(again.factors, profile.factors)
    assert torch.equal(again.budgets, profile.budgets)


def test_an_error_cannot_be_asked_of_a_profile_that_was_not_rehearsed():
    bare = calibrate(FIELD, noise(2, 0), TS, progress=False)
    with pytest.raises(ValueError, match="`rtol` needs a profile whose plans were rehearsed"):
        CachedField(FIELD, bare, rtol=0.01)
