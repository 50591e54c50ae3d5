"""A mixture of low-rank Gaussians for data, and with it a velocity field known exactly: v, dv/dx and dv/dt.

Component m has weight w_m, mean mu_m and covariance C_m = U_m diag(l_m) U_m^T + s_m I with U_m orthonormal (Tipping &
Bishop 1999). On a path x_t = alpha data + sigma noise it is N(alpha mu_m, A_m), A_m = alpha^2 C_m + sigma^2 I. With
y_m = x - alpha mu_m, G_m = A_m' / 2 = alpha alpha' C_m + sigma sigma' I and pi_m the posterior of m given x,

    v = sum_m pi_m v_m,    v_m = alpha' E[data | x, m] + sigma' E[noise | x, m] = alpha' mu_m + G_m A_m^-1 y_m,

in which nothing is divided by alpha or sigma. A_m and G_m have the eigenvectors of C_m, so neither is ever formed: such
a matrix is kept as R + 1 eigenvalues, the last for all that is orthogonal to U_m, and a vector y as S = R + d numbers,
U_m^T y and y - U_m U_m^T y.
Shapes: B samples of d elements, M components of rank R; t float, () or (B,), and 1|B an axis that is B for the last.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path as File
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from solvers.paths import Coefficients, Linear, Path, Time

LINEAR = Linear()


class Components(NamedTuple):
    """What the components say at (x, t)."""

    posterior: Tensor  # (M, B, 1), pi_m, summing to one over m
    velocity: Tensor  # (M, B, S), v_m
    score: Tensor  # (M, B, S), -A_m^-1 y_m
    slope: Tensor  # (M, 1|B, R + 1), dv_m/dx = G_m A_m^-1


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """The velocity field of the mixture on `path`; x (B, ...) has d elements a sample and the parameters' dtype.

    Exact wherever the path's coefficients are finite, both ends of `Linear` and `Cosine` included.
    """

    weight: Tensor  # (M,), w_m, summing to one
    mean: Tensor  # (M, d), mu_m
    basis: Tensor  # (M, d, R), U_m
    variance: Tensor  # (M, R), l_m >= 0
    residual: Tensor  # (M,), s_m > 0
    path: Path = LINEAR

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        flat = x.flatten(1)
        at = self._components(flat, self.path.coefficients(t, flat))
        return self._joined_mean(at.posterior, at.velocity).reshape(x.shape)

    def jacobian(self, x: Tensor, t: Time) -> Tensor:
        """dv/dx (B, d, d), symmetric: the mean over m of dv_m/dx, and the covariance of v_m with the score of m."""
        flat, rank = x.flatten(1), self.basis.shape[-1]
        at = self._components(flat, self.path.coefficients(t, flat))
        basis = self.basis.transpose(0, 1).flatten(1)  # (d, M R)
        inside, outside = at.slope[..., :rank], at.slope[..., rank:]
        excess = (at.posterior * (inside - outside)).transpose(0, 1).flatten(1)  # (B, M R)
        mean = (excess[:, None] * basis) @ basis.T + torch.diag_embed((at.posterior * outside).sum(0).expand_as(flat))
        velocity = self._joined(at.velocity) - self._joined_mean(at.posterior, at.velocity)
        score = self._joined(at.score) - self._joined_mean(at.posterior, at.score)
        return mean + torch.einsum("mbi,mbj->bij", at.posterior * velocity, score)

    def time_derivative(self, x: Tensor, t: Time) -> Tensor:
        """dv/dt at fixed x (B, ...): the mean over m of dv_m/dt, and the covariance of v_m with d log N(x; m) / dt."""
        flat, t = x.flatten(1), torch.as_tensor(t, dtype=None if isinstance(t, Tensor) else torch.float64)
        schedule = partial(self.path.coefficients, x=flat)
        c, dc = torch.func.jvp(schedule, (t,), (torch.ones_like(t),))  # type: ignore[misc]
        at, mu = self._components(flat, c), self._split(self.mean[:, None])
        dpull = (c.dalpha**2 + c.alpha * dc.dalpha) * self._spectrum + c.dsigma**2 + c.sigma * dc.dsigma  # G_m'
        # v_m = alpha' mu_m - G_m score_m, whose own derivative is A_m^-1 (v_m - G_m score_m)
        dv = dc.dalpha * mu - self._wide(dpull) * at.score - self._wide(at.slope) * (2 * at.velocity - c.dalpha * mu)
        # the continuity equation of m: d log N / dt = -div v_m - v_m . score_m
        dlog = -self._trace(at.slope) - (at.velocity * at.score).sum(-1, keepdim=True)
        excess = dlog - (at.posterior * dlog).sum(0)
        return self._joined_mean(at.posterior, dv + at.velocity * excess).reshape(x.shape)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n data (n, d)."""
        m = torch.multinomial(self.weight, n, replacement=True, generator=generator)
        z = torch.randn(n, sum(self.basis.shape[1:]), generator=generator, device=m.device).to(self.mean)
        outside, inside = z.split(self.basis.shape[1:], dim=1)
        inside = self.basis[m] @ (self.variance[m].sqrt() * inside)[..., None]
        return self.mean[m] + inside.squeeze(-1) + self.residual[m, None].sqrt() * outside

    def select(self, rows: Tensor) -> GaussianMixture:
        """The field of these samples alone: itself, for it is conditioned on nothing."""
        return self

    def to(self, target: torch.dtype | torch.device | str) -> GaussianMixture:
        """As `Tensor.to`; U_m is orthonormalised anew, so that the field is exact to the rounding of its own dtype."""
        parameters = {name: value.to(target) for name, value in self._parameters().items()}
        parameters["basis"] = torch.linalg.qr(parameters["basis"]).Q
        return GaussianMixture(**parameters, path=self.path)

    def save(self, file: str | File, /, **facts: str) -> None:
        """Write the parameters in single precision, and in the header any `facts` worth keeping."""
        save_file({name: value.float().contiguous() for name, value in self._parameters().items()}, file, facts)

    @classmethod
    def load(cls, file: str | File, path: Path = LINEAR, dtype: torch.dtype = torch.float32) -> GaussianMixture:
        """Read what `save` wrote: these numbers define the field, in every dtype."""
        return cls(**load_file(file), path=path).to(dtype)

    def _parameters(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "path"}

    @property
    def _spectrum(self) -> Tensor:
        """The eigenvalues of C_m (M, 1, R + 1)."""
        residual = self.residual[:, None]
        return torch.cat([self.variance + residual, residual], dim=-1)[:, None]

    def _components(self, x: Tensor, c: Coefficients) -> Components:
        """At x (B, d), where the path's coefficients are () or (B, 1)."""
        covariance = c.alpha**2 * self._spectrum + c.sigma**2  # A_m
        pull = c.alpha * c.dalpha * self._spectrum + c.sigma * c.dsigma  # G_m
        slope, y = pull / covariance, self._split(x - c.alpha * self.mean[:, None])
        score = -y / self._wide(covariance)
        velocity = c.dalpha * self._split(self.mean[:, None]) + self._wide(slope) * y
        log_density = ((y * score).sum(-1, keepdim=True) - self._trace(covariance.log())) / 2  # and a constant
        log_joint = self.weight.log()[:, None, None] + log_density
        posterior = F.threshold(log_joint.softmax(0), 1e-20, 0.0)  # less is lost in rounding, and denormals are slow
        return Components(posterior, velocity, score, slope)

    def _split(self, y: Tensor) -> Tensor:
        """y (M, 1|B, d) as (M, 1|B, S)."""
        inside = y @ self.basis
        return torch.cat([inside, y - inside @ self.basis.mT], dim=-1)

    def _joined(self, y: Tensor) -> Tensor:
        """The inverse of `_split`."""
        rank = self.basis.shape[-1]
        return y[..., :rank] @ self.basis.mT + y[..., rank:]

    def _joined_mean(self, posterior: Tensor, y: Tensor) -> Tensor:
        """sum_m pi_m y_m (B, d), of y_m (M, B, S)."""
        rank, y = self.basis.shape[-1], posterior * y
        return torch.einsum("mbr,mdr->bd", y[..., :rank], self.basis) + y[..., rank:].sum(0)

    def _wide(self, matrix: Tensor) -> Tensor:
        """The eigenvalues (M, 1|B, R + 1) as what multiplies a vector's S numbers, (M, 1|B, S)."""
        d, rank = self.basis.shape[1:]
        return torch.cat([matrix[..., :rank], matrix[..., rank:].expand(*matrix.shape[:-1], d)], dim=-1)

    def _trace(self, matrix: Tensor) -> Tensor:
        """The sum of the d eigenvalues, (M, 1|B, 1)."""
        d, rank = self.basis.shape[1:]
        return matrix[..., :rank].sum(-1, keepdim=True) + (d - rank) * matrix[..., rank:]
