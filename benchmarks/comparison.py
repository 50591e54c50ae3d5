"""Everybody on every field at equal evaluations: the tables that tell whether to adopt this.

    python -m benchmarks.comparison [--quick] [--fields wan ...] [--methods ours ...] [--samples 32] [--choose]
    python -m benchmarks.comparison --seconds    # nothing but those, of what is in the results

The reference of a sample is the same sampler with all 50 evaluations, the truth its ODE solved with 200 steps of UniPC.
Settings are those of results/settings.json, found on the choosing seeds by `--choose`; numbers are of the reported
seeds. Writes results/comparison.csv, in which rows of other fields and methods stay, environment.json and
docs/comparison_*.png, and prints the tables as Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from tqdm import tqdm

from benchmarks.cases import STEPS, Case, cases
from benchmarks.methods import FORECAST, HOLD, METHODS, Method, Outcome, free_solvers, peer_settings, plain
from benchmarks.metrics import psnr, ssim, stlpips
from benchmarks.results import Result, environment, read, summary, write
from benchmarks.written import TITLES, Row, markdown, publish
from solvers import UniPC, integrate

BUDGETS = (25, 20, 15, 10)
OURS = ("ours", "ours-unipc", "ours-fine")  # calibrated, with all that we know
WITHOUT = ("ours-uncalibrated", "ours-assumed")
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
SETTINGS = RESULTS / "settings.json"
TRUE_STEPS = 200
CHOSEN_ON, PEERS_CHOSEN_ON = 4, 1  # samples of the choosing seeds
SLACK = 0.5  # evaluations that a setting may cost above the budget


class Comparison:
    """The samples of one case that are looked at, and what they should have been."""

    def __init__(self, case: Case, count: int, purpose: str):
        self.case, self.samples, self.first = case, case.samples(count, purpose), case.samples(1, purpose)
        field, x, _ = self.samples
        self.full = integrate(field, x, case.grid(), case.stepper)
        self.reference = case.pixels(self.full)
        self.truth = case.pixels(integrate(field, x, case.grid(TRUE_STEPS), UniPC(case.path)))

    def all_steps(self) -> Result:
        """The line of the reference itself."""
        spent = seconds(lambda: integrate(*self.first[:2], self.case.grid(), self.case.stepper))
        return self.line("all-steps", STEPS, Outcome(self.full, STEPS), spent)

    def result(self, method: Method, nfe: int, found: dict[str, Any]) -> Result:
        """One line of the table; `seconds` are of one sample alone."""
        how = nfe, found.get(str(nfe)), found.get("measured")
        outcome = method.sample(self.case, self.samples, *how)
        return self.line(method.name, nfe, outcome, seconds(lambda: method.timed(self.case, self.first, *how)))

    def line(self, name: str, nfe: int, outcome: Outcome, seconds: float) -> Result:
        pixels = self.case.pixels(outcome.x)
        return summary(
            self.case.name,
            name,
            nfe,
            evaluations=outcome.evaluations,
            psnr=psnr(pixels, self.reference),
            ssim=ssim(pixels, self.reference),
            stlpips=stlpips(pixels, self.reference),
            psnr_true=psnr(pixels, self.truth),
            seconds=seconds,
        )

    def knob(self, method: Method, nfe: int, measured: Any) -> Any:
        """The knob at which these samples, of the choosing seeds, cost at most `nfe`; None where none does."""
        case, samples = self.case, self.samples
        if method.knob == "free":
            ends = {name: plain(samples, *run).x for name, run in free_solvers(case, nfe).items()}
            return max(ends, key=lambda name: float(psnr(case.pixels(ends[name]), self.truth).median()))
        low, high, found = math.log(1e-4), math.log(1e3), None
        for _ in range(10):
            middle = (low + high) / 2
            spent = method.sample(case, samples, nfe, math.exp(middle), measured).evaluations
            found = math.exp(middle) if spent <= nfe + SLACK else found
            low, high = (middle, high) if spent > nfe else (low, middle)
            if abs(spent - nfe) <= SLACK / 2:
                break
        return found


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def choose(case: Case, count: int, names: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """What the methods of these names, by default all, measure beforehand, and their knobs by budget."""
    bench, found = Comparison(case, count, "choosing"), {}
    methods = [METHODS[name] for name in names or METHODS if METHODS[name].runs_on(case)]
    for method in tqdm(methods, desc=f"settings on {case.name}"):
        measured = method.measure(case) if method.measure else None
        mine = {"measured": measured} if method.measure else {}
        if method.peer:
            few = case.samples(PEERS_CHOSEN_ON, "choosing")
            settings = peer_settings(case, few, method.peer, BUDGETS)
            mine |= {str(nfe): setting for nfe, setting in zip(BUDGETS, settings, strict=True)}
        elif method.knob:
            mine |= {str(nfe): bench.knob(method, nfe, measured) for nfe in BUDGETS}
        if mine:
            found[method.name] = mine
    return found


def compare(
    case: Case,
    count: int,
    budgets: tuple[int, ...],
    settings: dict[str, dict[str, Any]],
    names: Sequence[str] | None = None,
) -> list[Result]:
    """The methods of these names, by default all, at every budget that they can be had for, on one case."""
    bench = Comparison(case, count, "reported")
    results = [bench.all_steps()]
    methods = [METHODS[name] for name in names or METHODS if METHODS[name].runs_on(case)]
    for nfe in budgets:
        for method in tqdm(methods, desc=f"{case.name} at {nfe}"):
            found = settings.get(method.name, {})
            wanted = ["measured"] * bool(method.measure) + [str(nfe)] * bool(method.knob)
            if all(found.get(name) is not None for name in wanted):
                results.append(bench.result(method, nfe, found))
    return results


def timed(case: Case, results: list[Result], settings: dict[str, dict[str, Any]]) -> list[Result]:
    """The same lines with their seconds taken again, one method alone after the other: the lesser of two runs each."""
    first = case.samples(1, "reported")
    found = []
    for result in tqdm(results, desc=f"seconds on {case.name}"):
        run: Callable[[], Any]
        if result.method == "all-steps":
            run = partial(integrate, *first[:2], case.grid(), case.stepper)
        else:
            mine = settings.get(result.method, {})
            how = result.nfe, mine.get(str(result.nfe)), mine.get("measured")
            run = partial(METHODS[result.method].timed, case, first, *how)
        found.append(result._replace(seconds=min(seconds(run), seconds(run))))
    return found


def tables(results: list[Result]) -> dict[str, list[Row]]:
    """As they are to be read: by how much ours leads, and for every field who came how near to what."""
    leads = margins(results)
    found = {"What ours is above the best other, dB": leads} if leads else {}
    for name in dict.fromkeys(result.field for result in results):
        mine = [result for result in results if result.field == name and result.method != "all-steps"]
        itself = next(result.psnr_true for result in results if result.field == name and result.method == "all-steps")
        title = TITLES[name]
        near = f"{title}: PSNR to all 50 evaluations, dB, median (worst decile; standard error)"
        found[near] = _by_budget(mine, lambda r: f"{r.psnr:.1f} ({r.psnr_p10:.1f}; {r.psnr_se:.1f})")
        found[f"{title}: SSIM · ST-LPIPS"] = _by_budget(mine, lambda r: f"{r.ssim:.4f} · {r.stlpips:.5f}")
        true = f"{title}: PSNR to the true ODE, dB, where all 50 evaluations have {itself:.1f}"
        found[true] = _by_budget(mine, lambda r: f"{r.psnr_true:.1f}")
    return found


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
        if not mine.keys() >= {"ours", "fewer-steps", "fewer-steps-unipc"}:
            continue  # measured in part
        row = {"field": TITLES[name], "evaluations": str(nfe)}
        for title, others in (("best that holds", HOLD), ("best forecasting peer", FORECAST)):
            best = max((mine[other] for other in others if other in mine), key=lambda r: r.psnr, default=None)
            row[title] = f"{mine['ours'].psnr - best.psnr:+.1f} ({best.method})" if best else "-"
        free = max(mine["fewer-steps"].psnr, mine["fewer-steps-unipc"].psnr)
        row["fewer steps"] = f"{mine['ours'].psnr - free:+.1f}"
        best_true = max(line.psnr_true for method, line in mine.items() if method in OURS)
        row["to the true ODE, best free solver"] = f"{best_true - mine['fewer-steps-unipc'].psnr_true:+.1f}"
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
                mine = [result for result in results if (result.field, result.method) == (field, name)]
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


def main(
    names: list[str], methods: list[str] | None, count: int, budgets: tuple[int, ...], choosing: bool, folder: Path
) -> None:
    """Measure, field by field, and write what there is after each."""
    settings = json.loads(SETTINGS.read_text()) if SETTINGS.exists() else {}
    for name in names:
        case = cases()[name]
        if choosing or name not in settings:
            settings[name] = settings.get(name, {}) | choose(case, CHOSEN_ON, methods if name in settings else None)
            SETTINGS.write_text(json.dumps(settings) + "\n")
        merge(compare(case, count, budgets, settings[name], methods), folder)


def again(names: list[str], folder: Path) -> None:
    """Take the seconds anew of all lines of these fields."""
    settings = json.loads(SETTINGS.read_text())
    for name in names:
        lines = [line for line in read(folder / "comparison.csv") if line.field == name]
        merge(timed(cases()[name], lines, settings[name]), folder)


def merge(lines: list[Result], folder: Path) -> None:
    """Write these lines, each in the place of the old one of its field, method and budget, or else behind them all."""
    file = folder / "comparison.csv"
    old = read(file) if file.exists() else []
    write(list({line[:3]: line for line in [*old, *lines]}.values()), file)


def present(folder: Path) -> None:
    """Machine, pictures and tables of what was measured: in docs/ if that is of the results that ship."""
    (folder / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
    results, pictures = read(folder / "comparison.csv"), ROOT / "docs" if folder == RESULTS else folder
    draw(results, "psnr", "PSNR to all 50 evaluations (dB)", pictures / "comparison_reference.png")
    draw(results, "psnr_true", "PSNR to the true ODE (dB)", pictures / "comparison_truth.png")
    if folder == RESULTS:
        publish("comparison", tables(results), ROOT / "docs/comparison.md")
    else:
        for title, rows in tables(results).items():
            print(f"\n{title}:\n\n{markdown(rows)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fields", nargs="+", choices=list(cases()), default=list(cases()), help="by default all")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="by default all")
    parser.add_argument("--samples", type=int, default=16, help="to report on, of each field (default 16)")
    parser.add_argument("--quick", action="store_true", help="4 samples, 25 and 15 evaluations, into build/")
    parser.add_argument("--seconds", action="store_true", help="only time what was measured again; nothing else runs")
    parser.add_argument("--choose", action="store_true", help="find the methods' settings anew, on the choosing seeds")
    options = parser.parse_args()
    some, most = (4, BUDGETS[::2]) if options.quick else (options.samples, BUDGETS)
    out = ROOT / "build/bench" if options.quick else RESULTS
    out.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    if options.seconds:
        again(options.fields, out)
    else:
        main(options.fields, options.methods, some, most, options.choose, out)
    present(out)
