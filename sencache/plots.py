"""Pictures of a profile and of what runs did; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from sencache.profile import SensitivityProfile
from sencache.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
