"""Section 4.4 of the SenCache paper as a figure and a table: what is seen of the true change of a reuse.

Drawn by `python -m benchmarks.paper_figures terms`; what it is made of is in `terms.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from benchmarks.cases import cases
from benchmarks.recorded import Recording
from benchmarks.terms import GAPS, PREDICTORS, THIRDS, agreement, changes
from benchmarks.written import BLUE, GREY, RED, TITLES, Row, publish, save, write

COLOURS = dict(zip(PREDICTORS, ("#4f9d69", "#e08e45", RED, "0.35", BLUE, "#6fa8dc"), strict=True))


def figure_terms(recordings: dict[str, Recording]) -> None:
    """What the two terms of S, S, own differences and plans see of the true change of a reuse."""
    size = max(5.0 * len(recordings), 9), 13
    figure, axes = plt.subplots(4, len(recordings), figsize=size, layout="constrained", squeeze=False, sharey="row")
    rows: list[Row] = []
    for column, (name, recording) in zip(axes.T, recordings.items(), strict=True):
        case = cases()[name]
        found, steps = changes(recording, case.profile, case), len(recording.y)
        whole = torch.ones_like(found.step, dtype=torch.bool)
        parts = {"all": whole} | {third: found.third(steps) == k for k, third in enumerate(THIRDS)}
        parts |= {f"gap {gap}": found.gap == gap for gap in sorted(set(found.gap.tolist()))}
        for part, where in parts.items():
            for predictor, predicted in found.predicted.items():
                numbers = agreement(predicted[:, where], found.truth(predictor)[:, where])
                rows.append({"field": name, "part": part, "predictor": predictor, **numbers._asdict()})
        mine = [row for row in rows if row["field"] == name]
        column[0].set_title(f"{TITLES[name]}, {len(recording.x[0])} samples")
        draw_sizes(column[0], found.predicted, found.true["hold"], found.gap == 2, recording.ts[found.step])
        for axis, value in zip(column[1:], ("ratio", "rank", "within"), strict=True):
            draw_thirds(axis, mine, value)
    labels = (
        "RMS change over 2 steps",
        "predicted / true,\nmedian",
        "rank correlation over\nsamples, times, gaps",
        "rank correlation across\nsamples at one time and gap",
    )
    for axis, label in zip(axes[:, 0], labels, strict=True):
        axis.set_ylabel(label)
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save(figure, "What is seen of the true change of a reuse", "paper_terms")
    write("paper_terms", rows)
    publish_terms(rows)


def draw_sizes(axis: Axes, predicted: dict[str, Tensor], true: Tensor, where: Tensor, t: Tensor) -> None:
    """Medians over the samples of the change over one gap, beside the truth and its deciles, along t."""
    t, true = t[where], true[:, where]
    low, high = true.quantile(torch.tensor([0.1, 0.9], dtype=true.dtype), 0)
    axis.fill_between(t, low, high, color="black", alpha=0.15, lw=0)
    axis.plot(t, true.median(0).values, color="black", lw=2.4, label="true (band: deciles)")
    for name in list(PREDICTORS)[:5]:
        axis.plot(t, predicted[name][:, where].median(0).values, color=COLOURS[name], lw=1.4)
    axis.legend(fontsize=10)
    axis.set(yscale="log", xlabel="t, from noise to data")
    numbered(axis, (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2))
    axis.invert_xaxis()


def draw_thirds(axis: Axes, rows: list[Row], value: str) -> None:
    """One statistic of every predictor by third of the trajectory, with its bootstrap error."""
    names = ("all", *THIRDS)
    for k, (name, label) in enumerate(PREDICTORS.items()):
        mine = {row["part"]: row for row in rows if row["predictor"] == name}
        at = [place + 0.11 * (k - 2.5) for place in range(len(names))]
        values, errors = ([mine[part][key] for part in names] for key in (value, f"{value}_se"))
        axis.errorbar(
            at, values, [2 * error for error in errors], fmt="o", ms=5, capsize=3, color=COLOURS[name], label=label
        )
    axis.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
    axis.axhline(1, color=GREY, lw=0.8, ls=":")
    if value == "ratio":
        axis.set_yscale("log")
        numbered(axis, (0.25, 0.5, 1, 2, 4, 8, 16))
    elif value == "within":
        axis.axhline(0, color=GREY, lw=0.8, ls=":")
        axis.set_ylim(-1.1, 1.1)


def numbered(axis: Axes, ticks: Sequence[float]) -> None:
    """Those of `ticks` that a logarithmic axis shows, as plain numbers."""
    low, high = axis.get_ylim()
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(low, high, auto=True)  # the other columns share it, and may need more


def publish_terms(rows: list[Row]) -> None:
    whole = [
        {
            "field": row["field"],
            "predictor": row["predictor"],
            "rank correlation": f"{row['rank']:.2f} ± {row['rank_se']:.2f}",
            "across samples": f"{row['within']:.2f} ± {row['within_se']:.2f}",
            "predicted / true, median": f"{row['ratio']:.2f} ± {row['ratio_se']:.2f}",
            "its deciles": f"{row['low']:.2f} to {row['high']:.2f}",
            "under the truth": f"{row['under']:.0%}",
        }
        for row in rows
        if row["part"] == "all"
    ]
    known = {(row["field"], row["predictor"], row["part"]): row for row in rows}
    parted = []
    for row in whole:
        thirds = [known[row["field"], row["predictor"], third] for third in THIRDS]
        told = (("predicted / true", "ratio"), ("rank correlation", "rank"), ("across samples", "within"))
        shown = {f"{name}, thirds": " / ".join(f"{third[key]:.2f}" for third in thirds) for name, key in told}
        gaps = [known[row["field"], row["predictor"], f"gap {gap}"]["rank"] for gap in GAPS]
        shown["rank correlation, gap 1 / 2 / 3 / 4"] = " / ".join(f"{rank:.2f}" for rank in gaps)
        parted.append({"field": row["field"], "predictor": row["predictor"], **shown})
    publish(
        "paper_terms",
        {"Gaps 1 to 4, whole trajectories": whole, "First / middle / last third, and each gap alone": parted},
    )
