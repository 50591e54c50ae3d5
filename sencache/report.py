"""The record of a run: what was asked, what was computed, and why. Shapes: B samples (rows of the batch)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

FAR = 3.0  # times what a plan expects: beyond it the sampler's steps, and not reuse, keep a sample from the solution


class Query(NamedTuple):
    """One call of the cached field, as each of its B samples fared."""

    t: Tensor  # (B,) float64, the sampler's time
    predicted: Tensor  # (B,) float64, the change of the output since its last evaluation, S by the paper's rule, or
    #                    the error expected of a planned reuse; infinite where nothing is known or a node has come
    reused: Tensor  # (B,) bool, the rule's decision: the answer is made of earlier outputs
    duplicate: Tensor  # (B,) bool: x, t and conditioning were those of the call before
    computed: Tensor  # (B,) bool: the row went through the field
    branch: int  # which conditioning, in the order of appearance
    observed: Tensor  # (B,) float64, the RMS error of a reuse, as the next evaluation showed it; NaN until then, where
    #                   none came and where blocks were reused. A norm other than a root of squares it does not fit
    spent: Tensor  # (B,) float64, what was compared with the tolerance: `predicted`, or what reuses did to the sample


class Report:
    """Counts per sample (B,), and the trace of every query. A batch that grew is counted row by row.

    queries = evaluations + reuses + duplicates, where a row that was computed is an evaluation even if its sample had
    decided to reuse and its fresh output was left unused: what was paid is what is counted.
    """

    def __init__(self) -> None:
        self.trace: list[Query] = []
        self.bypasses = 0  # calls handed straight to the field because gradients were being recorded
        self.expected = math.nan  # the relative error of the final state that a plan expects,
        self.promised = math.inf  # and the one that 90 % of samples keep, if plans were rehearsed
        self.discretisation = math.nan  # and the full run's own, against the solution of the ODE, where that is known
        self.stable = True  # `Plan.stable`: whether errors are not known to grow from gap to gap
        self.resets = 0  # queries that began another trajectory: t ran backwards, or x is of another kind

    def add(self, query: Query, anew: bool) -> None:
        """Record a query; `anew` says whether it began another trajectory for any sample."""
        self.trace.append(query)
        self.resets += anew

    @property
    def queries(self) -> Tensor:
        return self._count(lambda query: torch.ones_like(query.reused))

    @property
    def evaluations(self) -> Tensor:
        return self._count(lambda query: query.computed)

    @property
    def reuses(self) -> Tensor:
        return self._count(lambda query: query.reused & ~query.computed)

    @property
    def duplicates(self) -> Tensor:
        return self._count(lambda query: query.duplicate & ~query.computed)

    @property
    def unused(self) -> Tensor:
        """Rows computed only because a fused batch cannot be split; `select(rows)` of the field avoids them."""
        return self._count(lambda query: (query.reused | query.duplicate) & query.computed)

    @property
    def cache_ratio(self) -> Tensor:
        """The share of queries that was not paid for, (B,) float64."""
        return 1 - self.evaluations / self.queries.clamp(min=1)

    def _count(self, happened: Callable[[Query], Tensor]) -> Tensor:
        total = torch.zeros(max((len(query.t) for query in self.trace), default=0), dtype=torch.int64, device="cpu")
        for query in self.trace:
            total[: len(query.t)] += happened(query)
        return total

    def __str__(self) -> str:
        if not self.trace:
            return "no queries yet"
        lines = [f"{'per sample':<12} {'median':>8} {'least':>8} {'most':>8}"]
        for name in ("queries", "evaluations", "reuses", "duplicates"):
            count = getattr(self, name)
            lines.append(f"{name:<12} {count.double().median():8g} {count.min():8d} {count.max():8d}")
        ratio = self.cache_ratio
        lines.append(f"{'cache ratio':<12} {ratio.median():8.1%} {ratio.min():8.1%} {ratio.max():8.1%}")
        off = [(query.observed / query.predicted)[query.observed.isfinite()] for query in self.trace]
        if sum(map(len, off)) and not math.isnan(self.expected):
            lines.append(f"observed over predicted error of the reuses: median {torch.cat(off).median():.2f}")
        if not math.isnan(self.expected):
            promised = f"; 90 % of samples keep {self.promised:.2g}" if self.promised < math.inf else ""
            lines.append(f"expected relative error of the sample: {self.expected:.2g}{promised}")
        if not self.stable:
            lines.append(
                "The plan has gaps so long beside 1 / ||J_x|| that errors can grow from one to the next: spend more "
                "evaluations, or compare with fewer steps."
            )
        if self.discretisation > FAR * self.expected:
            lines.append(
                f"The full run is itself about {self.discretisation:.2g} from the ODE's solution; reuse adds little. "
                "To come nearer to the solution, give `integrate` a second-order stepper, UniPC or DPMSolverPP, and "
                "more steps, calibrated on them: under a cache they are free."
            )
        if self.unused.any():
            hint = "give the field a `select(rows)`"
            if any((query.computed & query.reused).any() for query in self.trace):  # and not only exact repetitions
                hint += ", or the cache `together=True`"
            lines.append(f"{int(self.unused.sum())} rows were computed and not used: {hint}.")
        if self.bypasses:
            lines.append(f"{self.bypasses} calls went straight to the field because gradients were being recorded.")
        return "\n".join(lines)
