"""SiTField: guidance, both directions of time, rows, and what it says about wrong arguments."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.fields.sit import SiT
from sencache import CachedField, calibrate
from sencache.adapters.sit import SiTField
from solvers import Euler, Heun, grids, integrate

Y = torch.tensor([0, 2, 1, 2])
X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def model(dtype=torch.float32, seed=0):
    """A tiny SiT in which no weight is zero."""
    net = SiT(size=8, patch=4, dim=16, depth=2, heads=2, num_classes=3).to(dtype).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g))
    return net


NET = model()


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0, -1.5])
def test_guidance_is_that_of_two_calls_made_by_hand(scale):
    t = torch.tensor([0.1, 0.4, 0.4, 0.9])
    v, v_none = NET(X, t, Y), NET(X, t, torch.full((4,), 3))
    expected = (1 - scale) * v_none + scale * v
    torch.testing.assert_close(SiTField(NET, Y, guidance=scale)(X, t), expected, rtol=1e-5, atol=1e-5)
    assert (v - v_none).abs().max() > 0.1


def test_without_guidance_one_pass_is_paid_and_with_it_one_of_twice_the_batch():
    class Counting(nn.Module):
        num_classes, seen = 3, []

        def forward(self, x, t, y):
            self.seen.append((len(x), len(t), len(y)))
            return x

    SiTField(Counting(), Y)(X, 0.5)
    SiTField(Counting(), Y, guidance=2.0)(X, 0.5)
    assert Counting.seen == [(4, 4, 4), (8, 8, 8)]


@pytest.mark.parametrize("null", [None, 0])
def test_the_class_that_means_none_is_the_models_or_the_one_that_is_given(null):
    t = torch.full((4,), 0.3)
    none = torch.full((4,), 3 if null is None else null)
    torch.testing.assert_close(SiTField(NET, Y, guidance=0.0, null=null)(X, t), NET(X, t, none), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("stepper", [Euler(), Heun()], ids=["Euler", "Heun"])
def test_up_in_sits_time_and_down_in_the_papers_is_one_flow(stepper, guidance):
    net, x = model(torch.float64), X.double()
    up, down = (SiTField(net, Y, guidance=guidance, data_at=end) for end in (1, 0))
    ts = grids.shifted(10, 2.0)
    torch.testing.assert_close(integrate(up, x, 1 - ts, stepper), integrate(down, x, ts, stepper), rtol=1e-5, atol=1e-5)
    assert (up.path.data_at, down.path.data_at) == (1, 0)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("rows", [[0], [3, 1], [0, 1, 2, 3], [2, 2]], ids=str)
def test_selected_rows_are_rows_of_the_whole(rows, guidance):
    field, t, rows = SiTField(NET, Y, guidance=guidance), torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.tensor(rows)
    few = field.select(rows)
    torch.testing.assert_close(few(X[rows], t[rows]), field(X, t)[rows], rtol=1e-5, atol=1e-5)
    assert (few.guidance, few.fingerprint, few.path) == (field.guidance, field.fingerprint, field.path)
    assert torch.equal(field.y, Y)


@pytest.mark.parametrize("data_at", [0, 1])
def test_a_time_in_any_form_is_the_same_time(data_at):
    field = SiTField(NET, Y, guidance=2.0, data_at=data_at)
    forms = [
        0.25,
        torch.tensor(0.25),
        torch.tensor(0.25, dtype=torch.float64),
        torch.full((4,), 0.25),
        torch.tensor([0.25]),
    ]
    for t in forms:
        v = field(X, t)
        assert (v.shape, v.dtype) == (X.shape, X.dtype)
        assert torch.equal(v, field(X, forms[0]))


def test_each_sample_may_stand_at_its_own_time():
    field, t = SiTField(NET, Y), torch.tensor([0.1, 0.4, 0.6, 0.9])
    alone = torch.cat([field.select(torch.tensor([s]))(X[s : s + 1], t[s].item()) for s in range(4)])
    torch.testing.assert_close(field(X, t), alone, rtol=1e-5, atol=1e-5)


def test_of_a_learned_variance_the_first_channels_are_the_velocity():
    class Learned(nn.Module):
        def forward(self, x, t, y):
            return torch.cat([NET(x, t, y), torch.full_like(x, torch.nan)], 1)

    t = torch.full((4,), 0.3)
    assert torch.equal(SiTField(Learned(), Y)(X, t), NET(X, t, Y))


def test_the_fingerprint_names_what_changes_the_output_and_not_the_classes():
    other = [model(seed=1), {}], [NET, {"guidance": 2.0}], [NET, {"data_at": 0}]
    names = {SiTField(net, Y, **options).fingerprint for net, options in other}
    assert len({*names, SiTField(NET, Y).fingerprint}) == 4
    assert SiTField(NET, Y[:2]).fingerprint == SiTField(model(), Y).fingerprint


def test_it_is_calibrated_and_cached_each_sample_alone():
    field, ts = SiTField(NET, Y, guidance=2.0), grids.uniform(12, 0.0, 1.0)
    profile = calibrate(field, X[:4], ts, progress=False)
    cached = CachedField(field, profile, tolerance=5, reuse="hold", correct=False)
    end = cached.integrate(X, ts)
    assert (cached.report.reuses > 0).all()
    assert (cached.report.unused == 0).all()
    alone = CachedField(field.select(torch.tensor([1])), profile, tolerance=5, reuse="hold", correct=False)
    torch.testing.assert_close(alone.integrate(X[1:2], ts), end[1:2], rtol=1e-4, atol=1e-4)


ERRORS = {
    "classes that are floats": (lambda: SiTField(NET, Y.float()), r"`y` must be integer classes.*float32"),
    "classes of two dimensions": (lambda: SiTField(NET, Y[:, None]), r"`y` must be integer.*shape \(4, 1\)"),
    "no class": (lambda: SiTField(nn.Identity(), Y, guidance=2.0), r"no `num_classes`: give `null`"),
    "another batch": (lambda: SiTField(NET, Y)(X[:2], 0.5), r"conditioned for 4 samples, and x holds 2"),
    "data elsewhere": (lambda: SiTField(NET, Y, data_at=2), r"`data_at`.*0 or 1; got 2"),
}


@pytest.mark.parametrize(("wrong", "words"), ERRORS.values(), ids=ERRORS)
def test_wrong_arguments_are_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong()
