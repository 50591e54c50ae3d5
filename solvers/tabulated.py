"""The path of a discrete diffusion schedule, known at T timesteps and smooth in between."""

from __future__ import annotations

import torch
from torch import Tensor

from solvers.paths import Path


class Tabulated(Path):
    """alpha = cos(angle), sigma = sin(angle), with alpha^2 = `alphas_cumprod` (T,) at u = (n + 1) / T for timestep n.

    A step before the first timestep, at u = 0, are the data, alpha = 1 ("set_alpha_to_one" in diffusers). A schedule
    of zero terminal SNR ends in pure noise, alpha = 0. In between the angle is interpolated by monotone cubics (Fritsch
    and Butland 1984), so that velocities are continuous. A network with v-prediction returns alpha noise - sigma data,
    which is dx / d angle: the velocity is that times d angle / dt, the determinant.

    Its name has eight of the table's values to two digits, in which machines agree that round a product of a thousand
    factors each in its own way: profiles know a path by its name.

    Raises ValueError where `alphas_cumprod` does not fall strictly within [0, 1).
    """

    def __init__(self, alphas_cumprod: Tensor, data_at: float = 0.0):
        super().__init__(data_at)
        table = alphas_cumprod.detach().double().cpu()
        if table.ndim != 1 or len(table) < 2 or not ((table.diff() < 0).all() and table[0] < 1 and table[-1] >= 0):
            ends = f", from {table[0]:g} to {table[-1]:g}" if table.ndim == 1 and len(table) else ""
            raise ValueError(
                "`alphas_cumprod` must fall strictly, from below 1 to 0 or more, over two timesteps or more; got shape "
                f"{tuple(table.shape)}{ends}. Give the scheduler's own table."
            )
        marks = table[torch.linspace(0, len(table) - 1, 8, device="cpu").round().long()]
        self.steps, self.marks = len(table), " ".join(f"{mark:.2g}" for mark in marks.tolist())
        alpha, sigma = (torch.cat([table.new_tensor([end]), part]) for end, part in ((1, table), (0, 1 - table)))
        self.angle = torch.atan2(sigma.sqrt(), alpha.sqrt())  # (T + 1,)
        self.complement = torch.atan2(alpha.sqrt(), sigma.sqrt())  # pi / 2 - angle, exact where that is 0
        secant = self.angle.diff()
        harmonic = 2 / (1 / secant[1:] + 1 / secant[:-1])
        self.slope = torch.cat([secant[:1], harmonic, secant[-1:]])  # a step

    def _schedule(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        at = (u.double() * self.steps).cpu()
        k = at.floor().clamp(0, self.steps - 1).long()
        s, m, m_next = at - k, self.slope[k], self.slope[k + 1]
        left = (1 + 2 * s) * (1 - s) ** 2  # Hermite's weights of both values; of the slopes s (1 - s)^2, s^2 (s - 1)
        bend = s * (1 - s) ** 2 * m + s**2 * (s - 1) * m_next
        angle = left * self.angle[k] + (1 - left) * self.angle[k + 1] + bend
        complement = left * self.complement[k] + (1 - left) * self.complement[k + 1] - bend
        chord = 6 * s * (1 - s) * (self.angle[k + 1] - self.angle[k])
        rate = self.steps * (chord + (1 - s) * (1 - 3 * s) * m + s * (3 * s - 2) * m_next)
        alpha, sigma = complement.sin(), angle.sin()
        return tuple(part.to(u) for part in (alpha, sigma, -rate * sigma, rate * alpha))  # type: ignore[return-value]

    def _u_of(self, log_snr: Tensor) -> Tensor:
        wanted = torch.atan(torch.exp(-log_snr))  # the angle
        low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
        for _ in range(60):  # bisection, down to rounding
            middle = (low + high) / 2
            alpha, sigma, _, _ = self._schedule(middle)
            above = torch.atan2(sigma, alpha) > wanted
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tabulated) and repr(self) == repr(other) and torch.equal(self.angle, other.angle)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return f"Tabulated({self.steps} timesteps, alphas_cumprod {self.marks}, data_at={self.data_at})"
