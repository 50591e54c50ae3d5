"""What the comparison says: by how much ours leads, who came how near to what, and pictures of both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from benchmarks.methods import FORECAST, HOLD
from benchmarks.results import Result
from benchmarks.written import TITLES, Row

OURS = ("ours", "ours-unipc", "ours-fine")  # calibrated
FINE = "ours-fine"  # the one that is after the true ODE
WITHOUT = ("ours-uncalibrated", "ours-assumed")
FREE = "fewer-steps-unipc"  # the best free solver, which everybody is compared with at its budgets


def tables(results: list[Result]) -> dict[str, list[Row]]:
    """As they are to be read: by how much ours leads, and for every field who came how near to what."""
    leads = margins(results)
    found = {"What ours is above the best other, dB": leads} if leads else {}
    everybody = {result.nfe for result in results if result.method == FREE} or {result.nfe for result in results}
    for name in dict.fromkeys(result.field for result in results):
        lines = [result for result in results if result.field == name]
        itself = next(line.psnr_true for line in lines if line.method == "all-steps")
        mine = [line for line in lines if line.method != "all-steps" and line.nfe in everybody]
        title = TITLES[name]
        near = f"{title}: PSNR to all 50 evaluations, dB, median (worst decile; standard error)"
        found[near] = _by_budget(mine, lambda r: f"{r.psnr:.1f} ({r.psnr_p10:.1f}; {r.psnr_se:.1f}){_spent(r)}")
        found[f"{title}: SSIM · ST-LPIPS"] = _by_budget(mine, lambda r: f"{r.ssim:.4f} · {r.stlpips:.5f}")
        true = f"{title}: PSNR to the true ODE, dB, where all 50 evaluations have {itself:.1f}"
        found[true] = _by_budget(mine, lambda r: f"{r.psnr_true:.1f}")
    rest = [result for result in results if result.method != "all-steps" and result.nfe not in everybody]
    return found | ({"Where less than half is saved": [_row(result) for result in rest]} if rest else {})


def _spent(result: Result) -> str:
    """What was spent, where that is more than half an evaluation from the budget."""
    return f" at {result.evaluations:.1f}" if abs(result.evaluations - result.nfe) > 0.5 else ""


def _row(result: Result) -> Row:
    """One line by itself."""
    return {
        "field": TITLES[result.field],
        "method": result.method,
        "evaluations": f"{result.evaluations:.1f}",
        "PSNR (worst decile; standard error)": f"{result.psnr:.1f} ({result.psnr_p10:.1f}; {result.psnr_se:.1f})",
        "SSIM · ST-LPIPS": f"{result.ssim:.4f} · {result.stlpips:.5f}",
    }


def _by_budget(results: list[Result], cell: Callable[[Result], str]) -> list[Row]:
    """A row a method, a column a budget."""
    budgets = sorted({result.nfe for result in results}, reverse=True)
    known = {(result.method, result.nfe): cell(result) for result in results}
    methods = dict.fromkeys(result.method for result in results)
    return [{"method": method} | {str(nfe): known.get((method, nfe), "-") for nfe in budgets} for method in methods]


def margins(results: list[Result]) -> list[Row]:
    """Of each field and budget: ours over the best that hold, over the best that forecast, and against the true ODE."""
    rows = []
    for name, nfe in dict.fromkeys((result.field, result.nfe) for result in results if result.method != "all-steps"):
        mine = {result.method: result for result in results if (result.field, result.nfe) == (name, nfe)}
        if not mine.keys() >= {"ours", FINE, "fewer-steps", FREE}:
            continue  # measured in part
        row = {"field": TITLES[name], "evaluations": str(nfe)}
        for title, others in (("best that holds", HOLD), ("best that forecasts", FORECAST)):
            best = max((mine[other] for other in others if other in mine), key=lambda r: r.psnr, default=None)
            row[title] = f"{mine['ours'].psnr - best.psnr:+.1f} ({best.method})" if best else "-"
        free = max(mine["fewer-steps"].psnr, mine[FREE].psnr)
        row["fewer steps"] = f"{mine['ours'].psnr - free:+.1f}"
        row["`ours-fine` to the true ODE, best free solver"] = f"{mine[FINE].psnr_true - mine[FREE].psnr_true:+.1f}"
        rows.append(row)
    return rows


def draw(results: list[Result], measure: str, label: str, file: Path) -> None:
    """Error against evaluations (above) and seconds (below), a field a column, a curve a method."""
    fields = list(dict.fromkeys(result.field for result in results))
    methods = [name for name in dict.fromkeys(result.method for result in results) if name != "all-steps"]
    others = [name for name in methods if not name.startswith("ours")]
    colours: dict[str, Any] = {name: plt.get_cmap("tab20")(number % 20) for number, name in enumerate(others)}
    colours |= dict(zip((*OURS, *WITHOUT), ("black", "royalblue", "crimson", "0.5", "darkorange"), strict=True))
    figure, axes = plt.subplots(2, len(fields), figsize=(4 * len(fields), 7.5), layout="constrained", squeeze=False)
    for column, field in enumerate(fields):
        for row, cost in enumerate(("evaluations", "seconds")):
            axis = axes[row][column]
            for name in methods:
                lines = [result for result in results if (result.field, result.method) == (field, name)]
                mine = sorted(lines, key=lambda result: result.nfe)
                style = dict(lw=2.2, marker="o", ms=5) if name.startswith("ours") else dict(lw=1, marker="s", ms=3)
                axis.plot(
                    [getattr(result, cost) for result in mine],
                    [getattr(result, measure) for result in mine],
                    color=colours[name],
                    label=name,
                    **style,
                )
            axis.set_xlabel("evaluations a sample" if row == 0 else "seconds a sample")
            axis.grid(alpha=0.3)
        axes[0][column].set_title(TITLES[field])
    for row in axes:
        row[0].set_ylabel(label)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(file, dpi=110)
    plt.close(figure)
