"""EasyCache (Zhou et al. 2025, arXiv 2507.02860; code: H-EmbodVis/EasyCache).

The last two evaluations, at r and the one before it, 2, say how much the output moves when the state does,

    k = |v_r - v_2|_1 / |x_r - x_2|_1,

and at every later query k |x - x_before|_1 / |v_r|_1 is added up, x_before being the state of the query before. An
output is reused while the sum is below a threshold tau. Nothing is calibrated. Reused is the difference v_r - x_r of
output and state, added to the state: ``payload="difference"``. Shapes: B samples; x, v (B, ...); ts (K + 1,).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sencache.baselines.steps import apart, due, grid_of, mean_abs
from sencache.batch import copy, take
from sencache.memory import Look


class Noted(NamedTuple):
    """What is remembered of a query."""

    x: Any  # its state, a tree of (B, ...)
    rate: Tensor  # (B,) float64, k; NaN until two evaluations are known
    size: Tensor  # (B,) float64, |v_r|_1 / d


class EasyCache:
    """The criterion: `tolerance` is the authors' tau, 0.05 for Wan and 0.025 for HunyuanVideo.

    warmup, last: how many steps at the ends of ts are always evaluated: 10 and 1 in the authors' code for Wan.
    """

    direction = 0

    def __init__(self, ts: Tensor, *, warmup: int = 10, last: int = 1):
        self.ts, self.warmup, self.last = grid_of(ts), warmup, last

    def watch(self, x: Any, t: Tensor | float, *args: Any, **kwargs: Any) -> Any:
        return x

    def predicted(self, seen: Look) -> Tensor:
        if seen.noted is None:
            return torch.full_like(seen.t, math.inf)
        change = seen.noted.rate * apart(seen.now, seen.noted.x) / seen.noted.size
        change = torch.where(change.isfinite(), change, math.inf)
        return (seen.spent + change).masked_fill(due(self.ts, seen, self.warmup, self.last), math.inf)

    def note(self, seen: Look, rows: Tensor, y: Any) -> Noted:
        unknown = torch.full_like(seen.t, math.nan)
        rate, size = (unknown, unknown) if seen.noted is None else (seen.noted.rate, seen.noted.size)
        if rows.any():
            k = unknown[rows]
            if seen.reference is not None:
                x_r, v_r = (take(rows, part) for part in seen.reference)
                k = apart(y, v_r) / apart(take(rows, seen.now), x_r)
                k = k.masked_fill((seen.anew | seen.other)[rows], math.nan)  # nor across two networks
            rate, size = (known.masked_scatter(rows, new) for known, new in ((rate, k), (size, mean_abs(y))))
        return Noted(copy(seen.now), rate, size)
