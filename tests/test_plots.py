"""Pictures show what the numbers say."""

import numpy as np
import pytest
import torch
from matplotlib import colors
from matplotlib.figure import Figure

from sencache import CachedField, SensitivityProfile
from sencache.plots import EVALUATED, REUSED, draw_profile, draw_trace
from solvers import grids

TS = grids.uniform(12)
PROFILE = SensitivityProfile(TS, torch.linspace(1, 2, 13), torch.linspace(2, 1, 13))


@pytest.fixture
def cached():
    field = CachedField(lambda x, t: -x * t, PROFILE, tolerance=0.3, max_reuses=2, reuse="hold")
    field.integrate(torch.ones(1, 3), TS)
    return field


def test_a_trace_is_dark_where_the_sample_was_evaluated(cached):
    axes = Figure().subplots()
    draw_trace(axes, {"run": cached.report})
    (mesh,) = axes.collections
    mesh.update_scalarmappable()
    shown = mesh.get_facecolors()
    evaluated = [bool(query.computed[0]) for query in cached.report.trace]
    expected = [colors.to_rgba(EVALUATED if is_dark else REUSED) for is_dark in evaluated]
    assert True in evaluated
    assert False in evaluated
    np.testing.assert_allclose(shown, expected, atol=0.01)


def test_a_profile_is_drawn_in_the_samplers_direction():
    axes = Figure().subplots()
    draw_profile(axes, PROFILE)
    left, right = axes.get_xlim()
    assert left > right
    for line, alpha in zip(axes.lines, (PROFILE.alpha_x, PROFILE.alpha_t), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), alpha)
