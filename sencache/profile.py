"""What calibration measured: how strongly a field answers to x and to t, as functions of t (SenCache, Eqs. 9, 11, 12).

Shapes: M calibrated times, S calibration samples. alpha_x is a ratio of norms; alpha_t is RMS output per unit of t.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import ge, le
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.interpolate import make_interp_spline
from torch import Tensor

from sencache.conformal import quantile, shortest, tolerance_limit

FORMAT = "sencache profile 1"
OPTIONAL = ("samples_x", "samples_t", "gram", "size", "end", "budgets", "expected", "factors", "ratios", "amplified")


@dataclass(frozen=True, eq=False)
class SensitivityProfile:
    """||J_x|| and ||J_t|| of a field at M times, and what they were measured on.

    Between two calibrated times the sensitivities are interpolated. Outside of them nothing is known: the predicted
    change is infinite and the cache evaluates. A value that could not be measured is NaN or infinite, never 0, and
    has the same effect.
    """

    t: Tensor  # (M,) strictly monotone, in the sampler's order
    alpha_x: Tensor  # (M,) mean over the samples
    alpha_t: Tensor  # (M,)
    samples_x: Tensor | None = None  # (S, M) alpha_x of each sample
    samples_t: Tensor | None = None  # (S, M)
    gram: Tensor | None = None  # (S, T, T) float64, <f_i, f_j> / d of a sample's outputs: at t, and at `end` if asked
    size: Tensor | None = None  # (S,) RMS of each sample's final state
    end: Tensor | None = None  # () the time at which that is
    budgets: Tensor | None = None  # (R,) int64, rising: the evaluations of the plans that were rehearsed
    expected: Tensor | None = None  # (R,) the relative errors that they expect, infinite where errors can grow
    factors: Tensor | None = None  # (R, S') error over expected error of each rehearsed sample
    ratios: Tensor | None = None  # (R, S', T) true over predicted error of each of their reuses; NaN at evaluations,
    #                               and throughout where runs diverged or nothing was compared with the truth
    amplified: Tensor | None = None  # (S', K) how many times larger an error of each output was in the end, of others
    facts: Mapping[str, Any] = field(default_factory=dict)  # what was measured: field, path, stepper, shape, version

    def __post_init__(self) -> None:
        for name in ("t", "alpha_x", "alpha_t"):
            value = torch.as_tensor(getattr(self, name), device="cpu").detach().double().clone()
            object.__setattr__(self, name, value)
            if value.ndim != 1 or value.shape != self.t.shape:
                came = f"{tuple(value.shape)} beside t's {tuple(self.t.shape)}"
                raise ValueError(f"t, alpha_x and alpha_t must be of one shape (M,); got {name} of shape {came}.")
        for name in OPTIONAL:
            if (part := getattr(self, name)) is not None:
                part = torch.as_tensor(part, device="cpu").detach()
                object.__setattr__(self, name, part.double() if part.is_floating_point() else part)
        if self.gram is not None and self.gram.shape[1:] not in [(n, n) for n in (len(self.t), len(self.t) + 1)]:
            raise ValueError(
                f"`gram` must be (S, T, T) of the {len(self.t)} outputs at `t`, and the one at `end` if that was asked "
                f"for; got shape {tuple(self.gram.shape)}."
            )
        steps = self.t.diff()
        if not len(self.t) or not self.t.isfinite().all() or (steps * steps[:1].sign() <= 0).any():
            raise ValueError(f"`t` must be finite and strictly monotone; got {self.t.tolist()}.")
        if self.ratios is not None and (self.budgets is None or len(self.ratios) != len(self.budgets)):
            raise ValueError("`ratios` (R, S', T) go with `budgets` (R,) of a rehearsal: leave out both, or neither.")
        for name in ("expected", "factors"):
            if (part := getattr(self, name)) is not None and (self.budgets is None or len(part) != len(self.budgets)):
                raise ValueError(
                    f"`{name}` of a rehearsal has a row for each of its `budgets`: leave out both, or neither."
                )
        if (self.alpha_x < 0).any() or (self.alpha_t < 0).any():
            raise ValueError("Sensitivities are norms and cannot be negative; use NaN where one could not be measured.")

    @property
    def grid(self) -> Tensor:
        """The calibrated grid, (M + 1,)."""
        if self.end is None:
            raise ValueError("This profile does not know where its grid ended; give the grid, `ts`.")
        return torch.cat([self.t, self.end.reshape(1)])

    def gram_at(self, t: Tensor) -> Tensor:
        """The Gram matrix (S, T, T) at times t (T,): as measured, or of the outputs' cubic interpolation in t.

        Times past the calibrated range take the output at its end.
        """
        if self.gram is None:
            raise ValueError(
                "This profile has no Gram matrix, which plans are made from; measure one with `calibrate`."
            )
        if not self.gram.isfinite().all():
            raise ValueError(
                "The Gram matrix of this profile is not finite, of which no plan can be made. Calibrate again."
            )
        known = self.t if self.gram.shape[-1] == len(self.t) else self.grid
        order, low, high = known.argsort(), known.min(), known.max()
        spline = make_interp_spline(known[order].numpy(), np.eye(len(order)), k=min(3, len(order) - 1))
        weights = torch.from_numpy(spline(t.clamp(low, high).numpy()))[:, order.argsort()]
        nearest = (t[:, None] - known).abs()
        exact = nearest.min(1).values <= 1e-6 * (high - low)
        weights[exact] = torch.eye(len(order), dtype=torch.float64, device="cpu")[nearest.argmin(1)[exact]]
        return weights @ self.gram @ weights.T

    def factor(self, nfe: int, share: float = 0.9) -> float:
        """By how much the final error of a plan of `nfe` evaluations exceeds what it expects in `share` of samples.

        A tolerance limit of the factors met in rehearsal: what it promises holds in nine of ten rehearsals, where a
        plain quantile would in half of them; fewer than 22 samples are too few for 90 %. It is of the plan that was
        rehearsed, and says nothing of others: infinite for other budgets.
        """
        if self.budgets is None or self.factors is None:
            raise ValueError("`rtol` needs a profile whose plans were rehearsed: `rehearse(field, profile, x_T, ts)`.")
        known = dict(zip(self._budgets(), self.factors, strict=True))
        return tolerance_limit(known[nfe], share) if nfe in known else math.inf

    def shortest(self, rtol: float) -> int | None:
        """The evaluations of the shortest rehearsed plan that keeps `rtol`, as longer ones do; None if none does."""
        self.factor(1)  # raises where nothing was rehearsed
        if self.expected is None:
            raise ValueError(
                "This profile was rehearsed by an earlier version, which `rtol` cannot read: rehearse again."
            )
        sizes = zip(self._budgets(), self.expected.tolist(), strict=True)
        return shortest({n: self.promise(n, size) for n, size in sizes}, rtol)

    def promise(self, nfe: int, expected: float) -> float:
        """The relative error that 90 % of samples keep under the plan of `nfe` evaluations that expects `expected`."""
        factor = self.factor(nfe)
        return expected * factor if factor < math.inf else factor

    def bound(self, nfe: int, share: float = 0.95, *, whole: bool = False) -> float:
        """How many times its prediction the error of a reuse is at most, in `share` of reuses, for `nfe` evaluations.

        The quantile of the ratios met in rehearsal; between budgets that were compared it is interpolated, and a guess.
        With `whole`, in `share` of trajectories for all of their reuses at once: a tolerance limit of their largest
        ratios, as in `factor`.
        """
        if self.ratios is None:
            raise ValueError("This needs a profile whose plans were rehearsed: `rehearse(field, profile, x_T, ts)`.")
        known = {n: each[:, ~each.isnan().any(0)] for n, each in self._compared().items()}  # (S', reuses)
        limit = tolerance_limit if whole else quantile
        groups = {n: each.amax(1) if whole and each.shape[1] else each.flatten() for n, each in known.items()}
        found = {n: limit(group / self.typical(n), share) for n, group in groups.items()}
        if whole or not min(found) <= nfe <= max(found):
            return _around(nfe, found)
        return float(np.interp(nfe, list(found), list(found.values())))

    def typical(self, nfe: int) -> float:
        """The median ratio of a reuse's true error to the expected one, interpolated between budgets; 1 if unknown."""
        if self.ratios is None:
            return 1.0
        found = {n: float(each.nanmedian().nan_to_num(1.0, posinf=1.0)) for n, each in self._compared().items()}
        return float(np.interp(nfe, list(found), list(found.values())))

    def _budgets(self) -> list[int]:
        return [] if self.budgets is None else self.budgets.tolist()

    def _compared(self) -> dict[int, Tensor]:
        """The ratios (S', T) by budget, of those whose reuses are known, or that have none."""
        assert self.ratios is not None
        every = dict(zip(self._budgets(), self.ratios, strict=True))
        return {n: each for n, each in every.items() if n == each.shape[1] or not each.isnan().all()} or every

    @property
    def direction(self) -> int:
        """The sign of dt in the calibrated sampler; 0 where that is not known."""
        if len(self.t) < 2 or self.facts.get("direction") == "unknown":
            return 0
        return 1 if self.t[1] > self.t[0] else -1

    def covers(self, t: Tensor) -> Tensor:
        """Whether times t lie inside the calibrated range, up to the rounding of a float32 grid."""
        low, high = self.t.min(), self.t.max()
        slack = 1e-6 * (high - low)
        return (t >= low - slack) & (t <= high + slack)

    def near(self, t: Tensor) -> Tensor:
        """Whether times t lie on the calibrated grid, its end included, or hardly outside: a mean step of it."""
        known = self.t if self.end is None else self.grid
        step = (known.max() - known.min()) / max(1, len(known) - 1)
        return (t >= known.min() - step) & (t <= known.max() + step)

    def lookup(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_x and alpha_t at times t (B,), each (B,) float64; infinite outside the calibrated range."""
        order = self.t.argsort()
        nodes, inside = self.t[order].numpy(), self.covers(t)
        found = []
        for alpha in (self.alpha_x, self.alpha_t):
            known = alpha[order].nan_to_num(nan=torch.inf, posinf=torch.inf)
            value = torch.from_numpy(np.interp(t.double().numpy(), nodes, known.numpy()))
            found.append(torch.where(inside, value, torch.inf).nan_to_num(nan=torch.inf, posinf=torch.inf))
        return found[0], found[1]

    def predicted(self, t_ref: Tensor, t: Tensor, distance: Tensor, elapsed: Tensor) -> Tensor:
        """S = ||J_x|| ||dx|| + ||J_t|| |dt| (B,): how far the output has moved since it was evaluated at t_ref (B,).

        t: (B,) where the sampler stands. distance: (B,) RMS of x - x_ref. elapsed: (B,) |t - t_ref|.
        """
        alpha_x, alpha_t = self.lookup(t_ref)  # Alg. 1: the sensitivities at the reference
        s = alpha_x * distance + alpha_t * elapsed  # Eq. 9
        return torch.where(self.covers(t), s, torch.inf).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with a JSON header, whole or not at all."""
        parts = {name: getattr(self, name) for name in ("t", "alpha_x", "alpha_t", *OPTIONAL)}
        filled = {name: part.contiguous() for name, part in parts.items() if part is not None}
        target = check_folder(path)
        partial = target.with_name(target.name + ".partial")
        save_file(filled, partial, {"format": FORMAT, "facts": json.dumps(dict(self.facts))})
        os.replace(partial, target)

    @classmethod
    def load(cls, path: str | Path) -> SensitivityProfile:
        """Read what `save` wrote. Raises ValueError where the file is truncated or is something else."""
        if Path(path).is_dir():
            raise IsADirectoryError(f"{path} is a folder: name the file of a profile in it.")
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, a handle is no dict
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a whole safetensors file ({error}). Calibrate and save it again."
            ) from error
        if header.get("format") != FORMAT:
            came = header.get("format", f"a file holding {', '.join(parts) or 'nothing'}")
            raise ValueError(
                f"Expected {FORMAT!r} in {path}; got {came}. An authors' .npz is read by `SensitivityProfile.from_npz`."
            )
        try:
            return cls(**parts, facts=json.loads(header["facts"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no whole profile ({error}). Calibrate and save it again.") from error

    @classmethod
    def from_npz(cls, path: str | Path, numel: int) -> SensitivityProfile:
        """Read a file of the authors' code: `timesteps`, `J_x_norm`, `J_t_norm`, `sample_counts`.

        numel: elements of one sample's latent. Their J_t is an L2 norm, ours RMS, sqrt(numel) smaller; J_x is a
        ratio. Cells in which nothing was measured, 0 in the file, become NaN. Times keep the file's unit.
        """
        if numel < 1:
            raise ValueError(f"`numel` is the number of elements of one sample's latent, at least 1; got {numel}.")
        try:
            archive = np.load(path, allow_pickle=False)
        except (zipfile.BadZipFile, EOFError, ValueError) as error:
            raise ValueError(f"{path} is not a whole .npz file ({error}). Ask for it again.") from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError(f"Expected an .npz of several arrays in {path}; got a single array.")
        with archive as file:
            names = ["timesteps", "J_x_norm", "J_t_norm", "sample_counts"]
            missing = [name for name in names[:3] if name not in file.files]
            if missing:
                raise ValueError(f"Expected {', '.join(missing)} in {path}; got {', '.join(file.files)}.")
            found = [name for name in names if name in file.files]
            parts = {name: torch.from_numpy(file[name].astype(np.float64)).flatten() for name in found}
        sizes = {name: len(part) for name, part in parts.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"Expected as many values of everything in {path}; got {sizes}. Ask for it again.")
        order = parts["timesteps"].argsort(descending=True)
        unmeasured = parts.get("sample_counts", torch.ones_like(order)) == 0
        alpha_x = parts["J_x_norm"].masked_fill(unmeasured | (parts["J_x_norm"] == 0), torch.nan)
        alpha_t = parts["J_t_norm"].masked_fill(unmeasured | (parts["J_t_norm"] == 0), torch.nan) / numel**0.5
        facts = {"source": "npz", "direction": "unknown"}
        return cls(parts["timesteps"][order], alpha_x[order], alpha_t[order], facts=facts)


def check_folder(path: str | Path) -> Path:
    """Where a profile is to be saved; raises FileNotFoundError or IsADirectoryError where none can be."""
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder: name a file in it, such as {target / 'profile.safetensors'}.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {target.parent} to save the profile in: make it first.")
    return target


def _around(nfe: int, values: Mapping[int, float]) -> float:
    """The larger of the values, by rising budget, of those on both sides of `nfe`."""
    below, above = ([value for n, value in values.items() if side(n, nfe)] for side in (le, ge))
    return max(below[-1], above[0]) if below and above else math.inf
