"""Calibration measures what Eqs. 11 and 12 say, at the price it states, and can be interrupted anywhere."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.func import jvp, vmap

from benchmarks.fields.sit import SiT
from sencache import CachedField, SensitivityProfile, calibrate, jacobian_norms
from solvers import Cosine, DPMSolverPP, Euler, EulerMaruyama, Heun, Linear, WhiteNoise, grids
from tests.flows import GaussianFlow, Nonlinear, linear_flow, rms

TS = grids.uniform(7, 0.95, 0.1)
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class OutOfMemoryError(Exception):
    """What interrupts."""


@dataclass
class Counted:
    """A field that counts calls and rows, and fails when `left` calls are used up."""

    inner: object = field(default_factory=Nonlinear)
    rows: Tensor | None = None
    counts: dict = field(default_factory=lambda: {"calls": 0, "rows": 0, "left": math.inf})
    fingerprint: str = "ab12"

    def __call__(self, x, t):
        if not self.counts["left"]:
            raise OutOfMemoryError
        self.counts["left"] -= 1
        self.counts["calls"] += 1
        self.counts["rows"] += len(x)
        return self.inner(x, t)


class Split(Counted):
    def select(self, rows):
        return replace(self, rows=rows)


def measure(field, x=X, ts=TS, *args, **options):
    return calibrate(field, x, ts, *args, progress=False, **options)


def secants(f, x, dx, t, t_next):
    """Eqs. 11 and 12 at one step, (B,) each."""
    y = f(x, t)
    return rms(f(x + dx, t) - y) / rms(dx), rms(f(x, t_next) - y) / abs(t_next - t)


def heun(f, x, t, t_next):
    dt = t_next - t
    k1 = f(x, t)
    return dt / 2 * (k1 + f(x + dt * k1, t_next))


STEPS = {"Euler": (Euler(), lambda f, x, t, t_next: (t_next - t) * f(x, t)), "Heun": (Heun(), heun)}


# what is measured


@pytest.mark.parametrize("kind", [Counted, Split])
@pytest.mark.parametrize("ts", [TS, TS.flip(0), grids.shifted(5, 3.0)], ids=["falling", "rising", "shifted"])
@pytest.mark.parametrize("step", STEPS)
def test_the_secants_and_the_gram_matrix_are_those_of_the_samplers_own_steps(step, ts, kind):
    stepper, advance = STEPS[step]
    f, x = Nonlinear(), X
    profile = measure(kind(f), X, ts, stepper)
    outputs = []
    for k, (t, t_next) in enumerate(pairwise(ts.tolist())):
        dx = advance(f, x, t, t_next)
        alpha_x, alpha_t = secants(f, x, dx, t, t_next)
        torch.testing.assert_close(profile.samples_x[:, k], alpha_x, rtol=1e-9, atol=0)
        torch.testing.assert_close(profile.samples_t[:, k], alpha_t, rtol=1e-9, atol=0)
        outputs.append(f(x, t))
        x = x + dx
    assert torch.equal(profile.t, ts[:-1])
    torch.testing.assert_close(profile.alpha_x, profile.samples_x.mean(0))
    torch.testing.assert_close(profile.alpha_t, profile.samples_t.mean(0))
    for s in range(len(X)):
        for i, one in enumerate(outputs):
            for j, other in enumerate(outputs):
                product = torch.outer(one[s], other[s]).trace() / 6
                assert profile.gram[s, i, j].item() == pytest.approx(product.item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("path", [Linear(), Linear(1.0), Cosine()], ids=str)
@pytest.mark.parametrize("kind", [Counted, Split])
def test_on_noised_data_every_step_begins_at_the_noised_data(path, kind):
    f, ts = Nonlinear(), TS if path.data_at == 0 else 1 - TS
    profile = measure(kind(f), X, ts, path=path, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(3), dtype=X.dtype)
    for k, (t, t_next) in enumerate(pairwise(ts.tolist())):
        u = t if path.data_at == 0 else 1 - t
        quarter = math.pi / 2 * u
        alpha, sigma = (math.cos(quarter), math.sin(quarter)) if isinstance(path, Cosine) else (1 - u, u)
        x = alpha * X + sigma * noise
        alpha_x, alpha_t = secants(f, x, (t_next - t) * f(x, t), t, t_next)
        torch.testing.assert_close(profile.samples_x[:, k], alpha_x, rtol=1e-9, atol=0)
        torch.testing.assert_close(profile.samples_t[:, k], alpha_t, rtol=1e-9, atol=0)


def test_without_a_generator_the_noise_is_the_same_every_time_and_no_global_numbers_are_used():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, other = (measure(Counted(), path=Linear()) for _ in range(2))
    assert torch.equal(one.samples_x, other.samples_x)
    assert torch.equal(torch.get_rng_state(), before)


def test_on_a_linear_flow_no_secant_exceeds_the_exact_norm_and_that_in_time_meets_it():
    flow = linear_flow()
    profile = measure(Counted(flow))
    assert (profile.samples_x <= flow.alpha_x * (1 + 1e-9)).all()
    assert (profile.samples_x > 0).all()
    torch.testing.assert_close(profile.samples_t, torch.full_like(profile.samples_t, flow.alpha_t))


def test_on_an_isotropic_flow_every_secant_in_x_is_the_exact_norm():
    flow = GaussianFlow(Linear())
    profile = measure(Counted(flow))
    exact = torch.stack([flow.alpha_x(X, t) for t in TS[:-1]], 1)
    torch.testing.assert_close(profile.samples_x, exact, rtol=1e-8, atol=1e-8)


def test_a_step_of_no_length_says_nothing_and_is_not_zero():
    x = X.clone()
    x[1] = 0  # where v = 0 at every t
    profile = measure(Counted(), x)
    assert profile.samples_x.isnan().any(1).tolist() == [False, True, False, False]
    torch.testing.assert_close(profile.alpha_x, profile.samples_x[[0, 2, 3]].mean(0))
    assert measure(Counted(), x[1:2]).alpha_x.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_measure_nearly_the_same(dtype):
    rtol = {torch.float32: 1e-3, torch.bfloat16: 0.2}[dtype]
    fine, coarse = measure(Counted()), measure(Counted(), X.to(dtype))
    torch.testing.assert_close(coarse.alpha_x, fine.alpha_x, rtol=rtol, atol=0)
    torch.testing.assert_close(coarse.alpha_t, fine.alpha_t, rtol=rtol, atol=0)


def test_a_profile_says_what_it_was_measured_on():
    facts = measure(Counted(), X, TS, Heun()).facts
    assert facts["fingerprint"] == "ab12"
    assert (facts["samples"], facts["shape"], facts["stepper"]) == (4, [6], "Heun()")
    assert facts["along"] == "its own trajectories"
    assert measure(Counted(), path=Linear()).facts["path"] == "Linear(data_at=0.0)"


# the price


@pytest.mark.parametrize("kind", [Counted, Split])
@pytest.mark.parametrize(
    ("stepper", "own"),
    [(Euler(), 1), (Heun(), 2), (DPMSolverPP(Linear(), 2), 1)],
    ids=["Euler", "Heun", "DPM++2M"],
)
@pytest.mark.parametrize("path", [None, Linear()], ids=["trajectory", "noised"])
def test_at_most_two_evaluations_a_step_and_sample_are_added_to_the_samplers_own(kind, stepper, own, path):
    field = kind()
    measure(field, X, TS, stepper, path=path)
    assert field.counts["rows"] <= (own + 2) * 7 * 4
    assert field.counts["calls"] == field.counts["rows"] / (1 if kind is Split else 4)


# interruptions


@pytest.mark.parametrize("path", [None, Linear()], ids=["trajectory", "noised"])
@pytest.mark.parametrize("at", [0, 1, 10, 20])
@pytest.mark.parametrize("sample", range(4))
def test_an_interrupted_calibration_goes_on_and_pays_only_for_the_unfinished_samples(sample, at, path, tmp_path):
    file, whole = tmp_path / "p.safetensors", measure(Split(), path=path)
    dying = Split()
    dying.counts["left"] = 21 * sample + at  # 7 steps of 3 evaluations a sample
    with pytest.raises(OutOfMemoryError):
        measure(dying, path=path, file=file)
    field = Split()
    resumed = measure(field, path=path, file=file)
    assert field.counts["rows"] == 21 * (4 - sample)
    for profile in (resumed, SensitivityProfile.load(file)):
        for name in ("t", "alpha_x", "alpha_t", "samples_x", "samples_t", "gram"):
            assert torch.equal(getattr(profile, name), getattr(whole, name))
        assert dict(profile.facts) == dict(whole.facts)


def test_a_finished_calibration_is_read_and_not_paid_again(tmp_path):
    for kind in (Counted, Split):
        file, field = tmp_path / f"{kind.__name__}.safetensors", kind()
        first = measure(kind(), file=file)
        assert torch.equal(measure(field, file=file).samples_x, first.samples_x)
        assert field.counts["calls"] == 0


@pytest.mark.parametrize("stepper", [Euler(), Heun(), DPMSolverPP(Linear())], ids=str)
@pytest.mark.parametrize("left", [0, 1, 2, 3, 11, 20])
def test_a_field_that_cannot_be_split_goes_on_from_its_last_evaluation(stepper, left, tmp_path):
    whole, field, again = Counted(), Counted(), Counted()
    expected = measure(whole, X, TS, stepper)
    field.counts["left"] = left
    with pytest.raises(OutOfMemoryError):
        measure(field, X, TS, stepper, file=tmp_path / "p.safetensors")
    resumed = measure(again, X, TS, stepper, file=tmp_path / "p.safetensors")
    for name in ("samples_x", "samples_t", "gram", "size"):
        assert torch.equal(getattr(resumed, name), getattr(expected, name))
    assert again.counts["calls"] == whole.counts["calls"] - max(0, left - 1)  # the first is asked for again, to compare
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]


def test_what_was_kept_of_another_field_is_refused(tmp_path):
    field = Counted(fingerprint=None)
    field.counts["left"] = 5
    with pytest.raises(OutOfMemoryError):
        measure(field, file=tmp_path / "p.safetensors")
    for other in (Counted(linear_flow(), fingerprint=None), Counted(fingerprint="cd34")):
        with pytest.raises(ValueError, match=r"p.safetensors.0 holds another measurement.*Name another file"):
            measure(other, file=tmp_path / "p.safetensors")


OTHERS = {
    "model": dict(field=Split(fingerprint="cd34")),
    "samples": dict(x=X + 1),
    "fewer samples": dict(x=X[:2]),
    "grid": dict(ts=grids.uniform(7, 0.95, 0.05)),
    "more steps": dict(ts=grids.uniform(8, 0.95, 0.1)),
    "stepper": dict(stepper=Heun()),
    "way": dict(path=Linear()),
    "precision": dict(x=X.float()),
    "norm": dict(norm=lambda d: 2 * rms(d)),
    "model without a fingerprint": dict(field=Split(linear_flow(), fingerprint=None)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_file_of_another_measurement_is_refused(other, tmp_path):
    name = None if "without" in other else "ab12"
    calibrate(Split(fingerprint=name), X, TS, file=tmp_path / "p.safetensors", progress=False)
    changed = {"field": Split(), "x": X, "ts": TS, **OTHERS[other]}
    with pytest.raises(ValueError, match=r"p.safetensors holds another measurement.*differs in.*Name another file"):
        calibrate(**changed, file=tmp_path / "p.safetensors", progress=False)


def test_a_norm_is_known_by_what_it_measures_not_by_its_name(tmp_path):
    one, same, other = lambda d: rms(d), lambda d: rms(d), lambda d: 2 * rms(d)
    first = measure(Split(), norm=one, file=tmp_path / "p.safetensors")
    assert torch.equal(measure(Split(), norm=same, file=tmp_path / "p.safetensors").samples_x, first.samples_x)
    with pytest.raises(ValueError, match="holds another measurement"):
        measure(Split(), norm=other, file=tmp_path / "p.safetensors")


def test_a_calibration_of_a_stochastic_sampler_is_resumed_with_its_own_noise_or_refused(tmp_path):
    """Its noise goes on from wherever the generator stands, and an interruption moves it."""

    def stepper():
        return EulerMaruyama(Linear(), WhiteNoise(torch.Generator().manual_seed(0)))

    whole, dying, noise = measure(Split(), X, TS, stepper()), Split(), stepper()
    dying.counts["left"], resumed = 30, None
    with suppress(ValueError):
        with pytest.raises(OutOfMemoryError):
            measure(dying, X, TS, noise, file=tmp_path / "p.safetensors")
        resumed = measure(Split(), X, TS, noise, file=tmp_path / "p.safetensors")
    assert resumed is None or torch.equal(resumed.samples_x, whole.samples_x)


# exact Jacobians, and the secants' way to them


class Mixing:
    """tanh(W x + b t): a dense Jacobian that changes with x."""

    def __init__(self, d=6, dtype=torch.float64):
        g = torch.Generator().manual_seed(5)
        self.w = torch.randn(d, d, generator=g, dtype=dtype)
        self.b = torch.randn(d, generator=g, dtype=dtype)

    def __call__(self, x, t):
        return torch.tanh(x @ self.w.T + self.b * t)


def tiny_sit(x, t):
    return SIT(x, t.expand(len(x)), torch.tensor([0, 2, 3])[: len(x)])


torch.manual_seed(0)
SIT = SiT(size=8, patch=4, dim=16, depth=2, heads=2, num_classes=3).double().requires_grad_(False)
for parameter in SIT.parameters():
    parameter.copy_(0.3 * torch.randn_like(parameter))


@pytest.mark.parametrize("case", ["nonlinear", "SiT"])
def test_jacobian_norms_are_those_of_the_dense_jacobian(case):
    f, shape = (Mixing(), (3, 6)) if case == "nonlinear" else (tiny_sit, (3, 1, 8, 8))
    x = 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t, d = torch.tensor(0.4, dtype=torch.float64), x[0].numel()
    dense = torch.stack([jacobian(lambda x: f(x, t), x).reshape(3, d, 3, d)[s, :, s] for s in range(3)])
    values = torch.linalg.svdvals(dense)
    norms = jacobian_norms(f, x, t, iterations=120, probes=64)
    torch.testing.assert_close(norms.spectral, values[:, 0], rtol=1e-3, atol=0)
    assert (norms.spectral <= values[:, 0] * (1 + 1e-9)).all()
    exact = values.square().sum(1).sqrt()
    spread = (values**4).sum(1).div(exact**4).div(2 * 64).sqrt()  # sqrt(1 / (2 probes * stable rank)), or less
    assert ((norms.frobenius / exact - 1).abs() < 5 * spread).all()
    torch.testing.assert_close(norms.time, rms(jacobian(lambda t: f(x, t), t)), rtol=1e-5, atol=0)


def test_jacobian_norms_of_a_linear_and_of_a_diagonal_field_are_exact():
    flow = linear_flow()
    norms = jacobian_norms(flow, X, 0.3, iterations=500)
    torch.testing.assert_close(norms.spectral, torch.full((4,), flow.alpha_x, dtype=X.dtype), rtol=1e-6, atol=0)
    torch.testing.assert_close(norms.time, torch.full((4,), flow.alpha_t, dtype=X.dtype))
    norms = jacobian_norms(Nonlinear(), X, 0.3, iterations=500)
    torch.testing.assert_close(norms.spectral, Nonlinear().alpha_x(X, 0.3), rtol=1e-4, atol=0)
    torch.testing.assert_close(norms.time, Nonlinear().alpha_t(X, 0.3))


def test_a_field_that_does_not_depend_on_x_has_a_jacobian_of_norm_zero():
    norms = jacobian_norms(lambda x, t: 0 * x + t * t, X, 0.5)
    assert norms.spectral.tolist() == norms.frobenius.tolist() == [0] * 4
    torch.testing.assert_close(norms.time, torch.ones(4, dtype=X.dtype))


@pytest.mark.parametrize("f", [Nonlinear(), Mixing()], ids=["diagonal", "dense"])
def test_the_secants_converge_to_directional_derivatives_at_first_order(f):
    """alpha_x to the gain of J_x in the direction of v, never beyond its spectral norm; alpha_t to ||J_t||."""
    t0 = torch.tensor(0.4, dtype=torch.float64)
    v = f(X, t0)
    along = rms(vmap(lambda x, v: jvp(lambda x: f(x[None], t0)[0], (x,), (v,))[1])(X, v)) / rms(v)
    in_time = rms(jvp(lambda t: f(X, t), (t0,), (torch.ones_like(t0),))[1])
    errors = []
    for h in (1e-2, 1e-3, 1e-4):
        profile = measure(Counted(f), X, torch.stack([t0, t0 + h]))
        found, exact = torch.stack([profile.samples_x, profile.samples_t])[..., 0], torch.stack([along, in_time])
        errors.append((found - exact).abs().amax(1))
    errors = torch.stack(errors)
    assert (errors[-1] < 1e-3).all()
    torch.testing.assert_close(
        errors[:-1] / errors[1:], torch.full((2, 2), 10.0, dtype=torch.float64), rtol=0.2, atol=0
    )
    assert (along <= jacobian_norms(f, X, t0, iterations=300).spectral * (1 + 1e-4)).all()


def test_without_secants_a_step_costs_one_evaluation_and_plans_know_no_echoes():
    field, cheap = Counted(), Counted()
    whole, bare = measure(field), measure(cheap, secants=False)
    assert cheap.counts["rows"] * 3 == field.counts["rows"]
    assert torch.equal(whole.gram, bare.gram)
    silent = replace(whole, alpha_x=0 * whole.alpha_x)
    assert torch.equal(CachedField(cheap, bare, nfe=3).plan().nodes, CachedField(field, silent, nfe=3).plan().nodes)
    paper = CachedField(cheap, bare, tolerance=9.0, reuse="hold")
    paper.integrate(X, TS)
    assert not paper.report.reuses.any()


def test_a_state_too_large_to_square_in_float32_has_a_size_and_its_plan_an_error():
    x, ts = X.float(), grids.uniform(20)
    usual, large = (calibrate(lambda x, t: x * (1 + t), c * x, ts, progress=False) for c in (1, 1e21))
    torch.testing.assert_close(large.size / 1e21, usual.size, rtol=1e-5, atol=0)
    silent = replace(usual, alpha_x=0 * usual.alpha_x)  # secants of such numbers are not known, and so no echoes
    told = [CachedField(lambda x, t: x, profile, nfe=7).plan(ts).relative_error for profile in (silent, large)]
    assert told[1] == pytest.approx(told[0], rel=0.1)
