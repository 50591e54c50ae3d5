"""Everybody on every field at equal evaluations: the tables that tell whether to adopt this.

    python -m benchmarks.comparison [--quick] [--fields wan ...] [--methods ours ...] [--budgets 25 ...] [--samples 32]
                                    [--choose]
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
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.cases import STEPS, Case, cases
from benchmarks.leads import draw, tables
from benchmarks.methods import METHODS, Method, Outcome, free_solvers, peer_settings, plain
from benchmarks.metrics import psnr, ssim, stlpips
from benchmarks.results import Result, environment, read, summary, write
from benchmarks.written import markdown, publish
from solvers import UniPC, integrate

BUDGETS = (25, 20, 15, 10)
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
SETTINGS = RESULTS / "settings.json"
TRUE_STEPS = 200
CHOSEN_ON, ADAPTIVE_CHOSEN_ON = 4, 2  # samples of the choosing seeds; two of peers that run them one by one
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
        """With what these samples, of the choosing seeds, come nearest at a cost of `nfe`; None where they cannot."""
        case, samples = self.case, self.samples

        def run(knob: Any) -> Outcome:
            return method.sample(case, samples, nfe, knob, measured)

        def with_tolerance(option: dict[str, Any], tolerance: float) -> Outcome:
            return run(option | {"tolerance": tolerance})

        if method.knob == "free":
            ends = {name: plain(samples, *how).x for name, how in free_solvers(case, nfe).items()}
            return max(ends, key=lambda name: float(psnr(case.pixels(ends[name]), self.truth).median()))
        if not method.options:
            return self.tolerance(run, nfe)
        knobs = list(method.options)
        if method.knob == "tolerance":
            found = [(o, self.tolerance(partial(with_tolerance, o), nfe)) for o in method.options]
            knobs = [option | {"tolerance": each} for option, each in found if each is not None]
        near = [float(psnr(case.pixels(run(knob).x), self.reference).median()) for knob in knobs]
        return knobs[near.index(max(near))] if near else None

    def tolerance(self, run: Callable[[float], Outcome], nfe: int) -> float | None:
        """The tolerance at which a run costs at most `nfe` and half an evaluation, by bisection; None if none does."""
        low, high, found = math.log(1e-4), math.log(1e3), None
        for _ in range(10):
            middle = (low + high) / 2
            spent = run(math.exp(middle)).evaluations
            found = math.exp(middle) if spent <= nfe + SLACK else found
            low, high = (middle, high) if spent > nfe else (low, middle)
            if abs(spent - nfe) <= SLACK / 2:
                break
        return found


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def choose(
    case: Case, count: int, budgets: tuple[int, ...], names: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """What the methods of these names, by default all, measure beforehand, and their knobs by budget."""
    bench, found = Comparison(case, count, "choosing"), {}
    methods = [METHODS[name] for name in names or METHODS if METHODS[name].runs_on(case)]
    for method in tqdm(methods, desc=f"settings on {case.name}"):
        measured = method.measure(case) if method.measure else None
        mine = {"measured": measured} if method.measure else {}
        if method.peer:
            some = case.samples(ADAPTIVE_CHOSEN_ON if method.peer.adaptive else count, "choosing")
            settings = peer_settings(case, some, method.peer, budgets)
            mine |= {str(nfe): setting for nfe, setting in zip(budgets, settings, strict=True)}
        elif method.knob:
            mine |= {str(nfe): bench.knob(method, nfe, measured) for nfe in budgets}
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
            missing = [name for name in wanted if name not in found]
            if missing:
                raise ValueError(
                    f"{SETTINGS.name} has no {' and no '.join(missing)} for {method.name} on {case.name}. Run this "
                    f"with --choose --fields {case.name} --methods {method.name} --budgets {nfe}; or leave it out."
                )
            if all(found[name] is not None for name in wanted):
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


def main(
    names: list[str], methods: list[str] | None, count: int, budgets: tuple[int, ...], choosing: bool, folder: Path
) -> None:
    """Measure, field by field, and write what there is after each."""
    for name in names:
        case = cases()[name]
        if choosing or name not in known_settings():
            found = choose(case, CHOSEN_ON, budgets, methods if name in known_settings() else None)
            settings = known_settings()  # others may have written meanwhile
            mine = settings.setdefault(name, {})
            mine |= {method: mine.get(method, {}) | knobs for method, knobs in found.items()}
            SETTINGS.write_text(json.dumps(settings) + "\n")
        lines = compare(case, count, budgets, known_settings()[name], methods)
        asked = {(name, method, nfe) for method in methods or METHODS for nfe in budgets}
        merge(lines, folder, gone=asked - {line[:3] for line in lines})


def known_settings() -> dict[str, dict[str, dict[str, Any]]]:
    """By field, method and budget."""
    return json.loads(SETTINGS.read_text()) if SETTINGS.exists() else {}


def again(names: list[str], methods: list[str] | None, folder: Path) -> None:
    """Take the seconds anew of all lines of these fields and methods."""
    for name in names:
        lines = [line for line in read(folder / "comparison.csv") if line.field == name]
        lines = [line for line in lines if methods is None or line.method in methods]
        merge(timed(cases()[name], lines, known_settings()[name]), folder)


def merge(lines: list[Result], folder: Path, gone: Collection[tuple[Any, ...]] = ()) -> None:
    """Write these lines, each in the place of the old one of its field, method and budget, or else behind them all.

    gone: of which of those the old lines hold no longer.
    """
    file = folder / "comparison.csv"
    old = read(file) if file.exists() else []
    write(list({line[:3]: line for line in [*old, *lines] if line[:3] not in gone}.values()), file)


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
    parser.add_argument("--samples", type=int, help="to report on, of each field (default 16, quick 4)")
    parser.add_argument("--budgets", nargs="+", type=int, help="of evaluations (default 25 20 15 10, quick 25 15)")
    parser.add_argument("--quick", action="store_true", help="few samples and budgets, into build/")
    parser.add_argument("--seconds", action="store_true", help="only time what was measured again; nothing else runs")
    parser.add_argument("--choose", action="store_true", help="find the methods' settings anew, on the choosing seeds")
    options = parser.parse_args()
    some = options.samples or (4 if options.quick else 16)
    most = tuple(options.budgets or (BUDGETS[::2] if options.quick else BUDGETS))
    out = ROOT / "build/bench" if options.quick else RESULTS
    out.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    if options.seconds:
        again(options.fields, options.methods, out)
    else:
        main(options.fields, options.methods, some, most, options.choose, out)
    present(out)
