"""The mixture's field against dense Gaussians, automatic differentiation and its own flow."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path as File

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from benchmarks.fields.gmm import GaussianMixture
from solvers.paths import VP, Cosine, Linear, Path

PATHS = [kind(data_at) for kind in (Linear, Cosine, VP) for data_at in (0.0, 1.0)]
CLOSED = [path for path in PATHS if not isinstance(path, VP)]  # finite at both ends
SHIPPED = File(__file__).parents[1] / "benchmarks/fields/gmm.safetensors"
INSIDE = (0.01, 0.3, 0.8, 0.99)  # the times u, 0 at the data

over_paths = pytest.mark.parametrize("path", PATHS, ids=str)
over_times = pytest.mark.parametrize("u", INSIDE)


def mixture(path: Path, d: int = 6, rank: int = 2) -> GaussianMixture:
    """Three components, close enough to overlap, in float64."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(3, d, rank + 1, generator=generator, dtype=torch.float64)
    return GaussianMixture(
        weight=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
        mean=0.7 * normal[..., -1],
        basis=torch.linalg.qr(normal[..., :-1]).Q,
        variance=torch.tensor([[1.0, 0.3], [0.6, 0.1], [2.0, 0.0]], dtype=torch.float64),
        residual=torch.tensor([0.05, 0.2, 0.1], dtype=torch.float64),
        path=path,
    )


def covariances(field: GaussianMixture) -> Tensor:
    """C_m, dense (M, d, d)."""
    eye = torch.eye(field.mean.shape[1], dtype=field.mean.dtype)
    return field.basis @ torch.diag_embed(field.variance) @ field.basis.mT + field.residual[:, None, None] * eye


def dense(field: GaussianMixture, t: float) -> MixtureSameFamily:
    """The law of x_t."""
    c = field.path.coefficients(t)
    eye = torch.eye(field.mean.shape[1], dtype=field.mean.dtype)
    parts = MultivariateNormal(c.alpha * field.mean, c.alpha**2 * covariances(field) + c.sigma**2 * eye)
    return MixtureSameFamily(Categorical(field.weight), parts)


def moments(field: GaussianMixture) -> tuple[Tensor, Tensor]:
    """E[x] (d,) and E[x x^T] (d, d) of the data."""
    second = covariances(field) + field.mean[:, :, None] * field.mean[:, None]
    return field.weight @ field.mean, torch.einsum("m,mij->ij", field.weight, second)


def at(path: Path, u: float) -> float:
    return u if path.data_at == 0 else 1 - u


def points(n: int = 5, d: int = 6) -> Tensor:
    return 1.5 * torch.randn(n, d, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@over_paths
@over_times
def test_the_velocity_is_that_of_the_score_of_the_dense_mixture(path, u):
    field, t, x = mixture(path), at(path, u), points().requires_grad_()
    (score,) = torch.autograd.grad(dense(field, t).log_prob(x).sum(), x)
    expected = path.velocity_from_score(x.detach(), score, t)
    torch.testing.assert_close(field(x.detach(), t), expected, rtol=1e-9, atol=1e-9)


@over_paths
@over_times
def test_the_velocity_and_the_density_satisfy_the_continuity_equation(path, u):
    field, t, x = mixture(path), at(path, u), points().requires_grad_()
    (score,) = torch.autograd.grad(dense(field, t).log_prob(x).sum(), x)
    h, x = 1e-5 * min(1, 10 * u), x.detach()
    change = (dense(field, t + h).log_prob(x) - dense(field, t - h).log_prob(x)) / (2 * h)
    divergence = field.jacobian(x, t).diagonal(dim1=1, dim2=2).sum(-1)
    torch.testing.assert_close(change, -divergence - (field(x, t) * score).sum(-1), rtol=1e-4, atol=1e-4)


@over_paths
@over_times
def test_the_jacobian_is_the_derivative_of_the_velocity_in_x(path, u):
    field, t, x = mixture(path), at(path, u), points()
    automatic = torch.func.vmap(torch.func.jacrev(lambda x: field(x[None], t)[0]))(x)
    torch.testing.assert_close(field.jacobian(x, t), automatic, rtol=1e-9, atol=1e-9)


@over_paths
@over_times
def test_the_time_derivative_is_the_derivative_of_the_velocity_in_t(path, u):
    field, x, t = mixture(path), points(), torch.tensor(at(path, u), dtype=torch.float64)
    _, automatic = torch.func.jvp(lambda t: field(x, t), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(field.time_derivative(x, t), automatic, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", CLOSED, ids=str)
def test_everything_is_finite_and_continuous_at_both_ends(path):
    field, x = mixture(path), points()
    for end, near in ((0.0, 1e-7), (1.0, 1 - 1e-7)):
        for value in (field, field.jacobian, field.time_derivative):
            torch.testing.assert_close(value(x, at(path, end)), value(x, at(path, near)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", CLOSED, ids=str)
def test_at_pure_noise_the_data_are_expected_at_their_mean(path):
    field, x, t = mixture(path), points(), at(path, 1.0)
    c = path.coefficients(t)
    torch.testing.assert_close(field(x, t), c.dalpha * (field.weight @ field.mean) + c.dsigma * x)


@over_paths
def test_the_flow_carries_noise_to_the_moments_of_the_data(path):
    field, n, steps = mixture(path), 2048, 40
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    grid = [at(path, 1e-3 + (1 - 1e-3) * (1 - k / steps) ** 2) for k in range(steps + 1)]  # closer towards the data
    for t, later in pairwise(grid):  # the classical Runge-Kutta method
        dt = later - t
        k1 = field(x, t)
        k2 = field(x + dt / 2 * k1, t + dt / 2)
        k3 = field(x + dt / 2 * k2, t + dt / 2)
        k4 = field(x + dt * k3, later)
        x = x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    c = path.coefficients(grid[-1])
    first, second = moments(field)
    second = c.alpha**2 * second + c.sigma**2 * torch.eye(6, dtype=x.dtype)
    for value, expected in ((x, c.alpha * first), (x[:, :, None] * x[:, None], second)):
        assert ((value.mean(0) - expected).abs() < 5 * value.std(0) / math.sqrt(n)).all()


def test_samples_have_the_moments_of_the_mixture():
    field, n = mixture(Linear()), 100_000
    x = field.sample(n, torch.Generator().manual_seed(4))
    for value, expected in zip((x, x[:, :, None] * x[:, None]), moments(field), strict=True):
        assert ((value.mean(0) - expected).abs() < 5 * value.std(0) / math.sqrt(n)).all()


@over_paths
def test_a_row_does_not_feel_its_batch(path):
    field = GaussianMixture.load(SHIPPED, path, torch.float64)
    x, t = points(5, 256), torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    for value in (field, field.jacobian, field.time_derivative):
        together, alone = value(x, t), torch.cat([value(x[k : k + 1], t[k].item()) for k in range(5)])
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12 * alone.abs().max().item())


@over_paths
def test_single_precision_follows_double_precision_over_the_whole_time_range(path):
    fine, generator = GaussianMixture.load(SHIPPED, path, torch.float64), torch.Generator().manual_seed(5)
    data, noise = fine.sample(8, generator), torch.randn(8, 256, generator=generator, dtype=torch.float64)
    coarse = fine.to(torch.float32)
    for u in (1e-3 if isinstance(path, VP) else 0.0, 0.05, 0.5, 1.0):
        x, t = path.sample(data, noise, at(path, u)).float(), at(path, u)
        for name in ("__call__", "jacobian", "time_derivative"):
            value, expected = getattr(coarse, name)(x, t).flatten(1), getattr(fine, name)(x.double(), t).flatten(1)
            assert ((value - expected).norm(dim=1) < 3e-5 * (1 + expected.norm(dim=1))).all()


def test_the_state_keeps_its_shape_and_dtype():
    field, x = mixture(Linear()).to(torch.float32), points(4, 6).float().reshape(4, 1, 2, 3)
    for t in (0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64), torch.full((4,), 0.5)):
        for value in (field, field.time_derivative):
            assert (value(x, t).shape, value(x, t).dtype) == (x.shape, x.dtype)
        assert (field.jacobian(x, t).shape, field.jacobian(x, t).dtype) == ((4, 6, 6), x.dtype)
    assert field.select(torch.tensor([True, False, True, False])) is field


def test_a_saved_field_loads_as_the_field_it_was(tmp_path):
    field, x = mixture(Cosine()), points()
    field.save(tmp_path / "gmm.safetensors", data="none")
    loaded = GaussianMixture.load(tmp_path / "gmm.safetensors", Cosine(), torch.float64)
    torch.testing.assert_close(loaded(x, 0.3), field(x, 0.3), rtol=1e-5, atol=1e-5)


def test_the_shipped_basis_is_orthonormal_in_the_precision_it_is_loaded_in():
    basis = GaussianMixture.load(SHIPPED, dtype=torch.float64).basis
    torch.testing.assert_close(basis.mT @ basis, torch.eye(8, dtype=torch.float64).expand(50, 8, 8), rtol=0, atol=1e-14)
    assert SHIPPED.stat().st_size < 1e6
