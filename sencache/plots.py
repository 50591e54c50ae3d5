"""Pictures of a profile and of what runs did; matplotlib is imported when one is drawn."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from sencache.plan import Plan
from sencache.profile import SensitivityProfile
from sencache.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EVALUATED, REUSED = "#1f4e79", "#dfe7ef"


def draw_profile(axes: Axes, profile: SensitivityProfile) -> None:
    """||J_x|| and ||J_t|| against t: the mean over the calibration samples, and their range where it was kept."""
    curves = (
        ("J_x", profile.alpha_x, profile.samples_x, EVALUATED),
        ("J_t", profile.alpha_t, profile.samples_t, "#c0504d"),
    )
    for name, mean, samples, colour in curves:
        axes.plot(profile.t, mean, color=colour, label=rf"$\|{name}\|$")
        if samples is not None:
            axes.fill_between(
                profile.t, samples.nan_to_num().amin(0), samples.nan_to_num().amax(0), color=colour, alpha=0.15
            )
    if profile.direction < 0:
        axes.invert_xaxis()
    axes.set_xlabel("t, in the sampler's direction")
    axes.set_ylabel("sensitivity")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def draw_trace(axes: Axes, reports: Mapping[str, Report]) -> None:
    """A row a run, a cell a query, darker the more of its samples were evaluated there."""
    from matplotlib.colors import LinearSegmentedColormap

    shade = LinearSegmentedColormap.from_list("evaluated", [REUSED, EVALUATED])
    for row, report in enumerate(reports.values()):
        share = [float(query.computed.double().mean()) for query in report.trace]
        edges = np.linspace(0, 1, len(share) + 1)
        axes.pcolormesh(
            edges, [row - 0.4, row + 0.4], [share], cmap=shade, vmin=0, vmax=1, edgecolor="white", linewidth=0.4
        )
    axes.set_yticks(range(len(reports)), list(reports))
    axes.invert_yaxis()
    axes.set_xticks([0, 1], ["first step", "last step"])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def draw_plans(axes: Axes, plans: Sequence[Plan]) -> None:
    """The relative error of the final state that plans expect, and what 90 % of samples keep where that is known."""
    for name, colour in (("relative_error", EVALUATED), ("promised", "#c0504d")):
        points = [(len(plan.nodes), getattr(plan, name)) for plan in plans]
        known = [point for point in points if 0 < point[1] < math.inf]
        if known:
            label = "expected" if name == "relative_error" else "90 % of samples keep"
            axes.plot(*zip(*known, strict=True), "o-", color=colour, label=label)
            axes.set_yscale("log")
            axes.legend(frameon=False)
    axes.set_xlabel("evaluations")
    axes.set_ylabel("relative error of the sample")


def draw_nodes(axes: Axes, plans: Sequence[Plan]) -> None:
    """A row a plan, dark where it evaluates, one cell a query time."""
    for row, plan in enumerate(plans):
        evaluated = np.zeros(len(plan.times))
        evaluated[plan.nodes.numpy()] = 1
        colours = [EVALUATED if one else REUSED for one in evaluated]
        axes.bar(np.arange(len(evaluated)), 0.8, 1, row - 0.4, color=colours, align="edge", edgecolor="white", lw=0.3)
    if plans:
        shown = _some(plans[0].times)
        axes.set_xticks([k + 0.5 for k in shown], list(shown.values()))
    axes.set_yticks(range(len(plans)), [f"nfe={len(plan.nodes)}" for plan in plans])
    axes.invert_yaxis()
    axes.set_xlabel("t, in the sampler's direction")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def draw_outputs(axes: Axes, profile: SensitivityProfile) -> None:
    """How far the output at each time is from that at each other, relative to their size: mean over the samples."""
    assert profile.gram is not None
    gram = profile.gram.mean(0)[: len(profile.t), : len(profile.t)]
    size = gram.diagonal()
    apart = (size[:, None] + size - 2 * gram).clamp(min=0).sqrt() / ((size[:, None] + size) / 2).sqrt()
    image, shown = axes.imshow(apart.numpy(), cmap="viridis", vmin=0), _some(profile.t)
    axes.set_xticks(list(shown), list(shown.values()))
    axes.set_yticks(list(shown), list(shown.values()))
    axes.set_xlabel("t, in the sampler's direction")
    axes.figure.colorbar(image, ax=axes)


def _some(times: Tensor) -> dict[int, str]:
    """Some of the times (T,), in words, by their number."""
    shown = np.unique(np.linspace(0, len(times) - 1, 6).round().astype(int)).tolist()
    return {k: f"{times[k]:.4g}" for k in shown}


def draw_summary(figure: Figure, profile: SensitivityProfile, plans: Sequence[Plan]) -> None:
    """Sensitivities, or without them how the outputs differ; what plans expect; and where they evaluate."""
    figure.set_size_inches(14, 4)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.4])
    if (profile.alpha_x.isfinite() & profile.alpha_t.isfinite()).any() or profile.gram is None:
        draw_profile(left, profile)
        left.set_title("sensitivities, and their range over the samples", fontsize=10)
    else:
        draw_outputs(left, profile)
        left.set_title("relative difference of the outputs at two times", fontsize=10)
    if not plans:
        for axes in (middle, right):
            axes.text(0.5, 0.5, "no plans can be made of this profile", ha="center", va="center")
            axes.set_axis_off()
        return
    if "assumed" in profile.facts:
        middle.text(0.5, 0.5, "assumed, not measured:\nno error is expected of plans", ha="center", va="center")
        middle.set_axis_off()
    else:
        draw_plans(middle, plans)
        middle.set_title("what plans are expected to do", fontsize=10)
    draw_nodes(right, plans)
    right.set_title("what they evaluate (dark) and reuse (light)", fontsize=10)


def draw_samples(figure: Figure, rows: Mapping[str, Sequence[Any]]) -> None:
    """Pictures (H, W) or (H, W, 3) in [0, 1], a named row each, one column a sample."""
    first = next(iter(rows.values()))
    height, width = np.shape(first[0])[:2]
    across = min(10.0, max(1.0, 1.2 * width / height) * len(first))
    figure.set_size_inches(3 + across, len(rows) * max(0.8, across / len(first) * height / width))
    grid = figure.subplots(len(rows), len(first), squeeze=False)
    for axes, (name, pictures) in zip(grid, rows.items(), strict=True):
        for one, picture in zip(axes, pictures, strict=True):
            stretch = "equal" if height > 1 else "auto"  # a vector is a strip
            one.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect=stretch)
            one.set_xticks([])
            one.set_yticks([])
            one.spines[:].set_visible(False)
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)


@contextmanager
def saved(path: str | Path) -> Iterator[Figure]:
    """A figure that is written to `path` at the end, whole or not at all."""
    from matplotlib.figure import Figure

    figure, target = Figure(layout="constrained"), Path(path)
    yield figure
    partial = target.with_name(target.name + ".partial")
    try:
        figure.savefig(partial, format=target.suffix.lstrip("."), dpi=130)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def kinds() -> list[str]:
    """The endings of the files that `saved` can write."""
    from matplotlib.figure import Figure

    return sorted(Figure().canvas.get_supported_filetypes())
