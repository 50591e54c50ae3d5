"""MagCache (Ma et al. 2025, arXiv 2506.09045; code: Zehong-Ma/MagCache).

Along a full run the residuals r_k of the block stack keep their direction and shrink. gamma_k = mean |r_k| / |r_(k-1)|
over the tokens is measured once, and k - r steps after an evaluation the residual is off by about

    |1 - gamma_(r+1) ... gamma_k|.

These errors are summed since the last evaluation, and the residual is reused while the sum is below a threshold and no
more than K steps are skipped in a row. Shapes: B samples; tokens (B, N, D); ts (K + 1,).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sencache.baselines.steps import due, full_run, grid_of, step_of
from sencache.memory import Look
from sencache.trees import tensors
from solvers import Euler, Stepper

EULER = Euler()


class MagCache:
    """The criterion: `tolerance` is the authors' threshold, `max_reuses` their K; for Wan 0.12 and 4, 0.24 and 6.

    ratios: gamma_k of the steps of a grid, the first one 1, from `magnitude_ratios` or the authors' code. Of another
        number of steps than ts (K + 1,) has, the nearest of the same place in the order is taken, as the authors do.
    retention: the share of the steps, rounded down, that are always evaluated, at the beginning.
    """

    def __init__(self, ratios: Sequence[float], ts: Tensor, *, retention: float = 0.2):
        self.ts = grid_of(ts)
        if not 0 <= retention <= 1:
            raise ValueError(f"`retention` is a share of the steps, 0 to 1; got {retention}.")
        gamma = torch.tensor([float(ratio) for ratio in ratios], dtype=torch.float64, device="cpu")
        if not len(gamma) or not (gamma.isfinite() & (gamma > 0)).all():
            raise ValueError(f"`ratios` must be positive, one for each step; got {list(ratios)}.")
        steps = len(self.ts) - 1
        place = torch.linspace(0, len(gamma) - 1 if steps > 1 else 0, steps, dtype=torch.float64, device="cpu")
        self.product = gamma[place.round().long()].cumprod(0)  # (K,) gamma_0 ... gamma_k
        self.retained = int(steps * retention)

    @property
    def direction(self) -> int:
        return 1 if self.ts[-1] > self.ts[0] else -1

    def predicted(self, seen: Look) -> Tensor:
        step, ref = (step_of(self.ts, t).clamp(0, len(self.product) - 1) for t in (seen.t, seen.t_ref))
        error = (1 - self.product[step] / self.product[ref]).abs()
        return (seen.spent + error).masked_fill(due(self.ts, seen, self.retained, 0), math.inf)


def magnitude_ratios(
    field: Any, x: Tensor, ts: Tensor, stepper: Stepper = EULER, *, payload: str = "blocks"
) -> list[float]:
    """gamma_k of the K steps of ts (K + 1,), the first one 1, the mean over full runs from x (B, ...) at ts[0].

    The authors use one sample. payload: "blocks" measures `field.stack`, token by token; "output" what the field
    returns, each sample as a whole. Of several queries in a step the first is measured.
    """
    if payload not in ("blocks", "output"):
        raise ValueError(f"`payload` must be blocks or output; got {payload!r}.")
    if payload == "blocks" and not hasattr(field, "stack"):
        raise ValueError(f'{type(field).__name__} has no `stack(x, t)` to measure; take payload="output".')
    grid = grid_of(ts)
    sizes: dict[int, Tensor] = {}  # (B, tokens) of each step

    def look(x: Tensor, t: Tensor) -> Tensor:
        stack = field.stack(x, t) if payload == "blocks" else None
        v = field(x, t) if stack is None else field.head(x, t, stack)
        k = int(step_of(grid, t.double().cpu()))
        parts = [v.flatten(1)[:, None]] if stack is None else [part.flatten(1, -2) for part in tensors(stack)]
        sizes.setdefault(k, torch.cat([part.double().norm(dim=-1) for part in parts], 1).cpu())
        return v

    full_run(look, x, ts, stepper)
    return [1.0] + [float((sizes[k] / sizes[k - 1]).mean()) for k in range(1, len(grid) - 1)]
