"""Tables 1, 2 and 3 of the SenCache paper on the video fields that ship.

    python -m benchmarks.paper_tables [1 2 3] [--fields wan cogvideox ltx] [--samples 16]

Table 1: methods at the evaluations that the paper reports. Table 2: n at one tolerance, Table 3: tolerances at n = 3,
both on Wan. TeaCache, MagCache and SenCache hold what the blocks add to the tokens, as their authors' codes do, and
SenCache is strict in the first fifth of the steps; beside them SenCache on outputs, as the paper writes it, ours, and
fewer steps of the same sampler. Calibrated on 8 samples of the calibration seeds, thresholds found on 8 of the choosing
ones, numbers of the reported. Videos are compared decoded, with those of all 50 evaluations.
Writes benchmarks/results/paper_table_*.csv, docs/paper_tables.png of all of them, and the tables of
docs/paper_reproduced.md, which it prints too.
Shapes: B samples.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor
from tqdm import tqdm

from benchmarks.cases import Case
from benchmarks.metrics import psnr, ssim, stlpips
from benchmarks.paper_figures import available
from benchmarks.recorded import recorded, tolerance_for
from benchmarks.written import BLUE, ROOT, TITLES, Row, plt, publish, save, standard_error, write
from sencache import CachedField
from sencache.baselines import MagCache, TeaCache, magnitude_ratios, teacache_coefficients
from sencache.tolerance import strict_start
from solvers import integrate

OTHERS = 8  # samples that are calibrated, and that thresholds are found on
BUDGETS = {"wan": ((25, 2, 2), (21, 3, 4)), "cogvideox": ((22, 3, 4),), "ltx": ((27, 3, 4),)}  # NFE, n, MagCache's K
REUSES = (1, 2, 3, 4, 5, 7)
PAPER_TOLERANCES = (0.04, 0.05, 0.06, 0.07, 0.13)  # of Tables 2 (.05) and 3, where .05 spends 25 evaluations at n = 3
Made = Callable[[Any, Any, str], CachedField]  # of a field, the one whose `modulated` is watched, and a payload


class Bench:
    """A field: what methods measured on it, the samples that are reported, and what these should become."""

    def __init__(self, case: Case, samples: int):
        self.case, self.ts, self.profile = case, case.grid(), case.profile
        field, x, _ = case.samples(OTHERS, "calibration")
        self.coefficients = teacache_coefficients(field, x, self.ts, case.stepper)
        self.ratios = magnitude_ratios(field, x, self.ts, case.stepper)
        self.watched = case.samples(OTHERS, "choosing").field
        self.choosing = recorded(case, OTHERS, "choosing")
        self.field, self.x, _ = case.samples(samples, "reported")
        self.full = case.pixels(integrate(self.field, self.x, self.ts, case.stepper))
        self.near: dict[str, Tensor] = {}  # PSNR (B,) of what was measured last, by method

    def teacache(self, tolerance: float) -> Made:
        def made(field: Any, watched: Any, payload: str) -> CachedField:
            criterion = TeaCache(watched.modulated, self.coefficients, self.ts)
            return CachedField(field, criterion=criterion, tolerance=tolerance, reuse="hold", payload=payload)

        return made

    def magcache(self, tolerance: float, most: int) -> Made:
        criterion = MagCache(self.ratios, self.ts)
        options: dict[str, Any] = {"tolerance": tolerance, "max_reuses": most, "reuse": "hold"}
        return lambda field, watched, payload: CachedField(field, criterion=criterion, payload=payload, **options)

    def sencache(self, tolerance: float, n: int) -> Made:
        epsilon = strict_start(self.ts, tolerance)
        options: dict[str, Any] = {"tolerance": epsilon, "max_reuses": n, "reuse": "hold"}
        return lambda field, watched, payload: CachedField(field, self.profile, payload=payload, **options)

    def spending(self, nfe: int, made: Callable[[float], Made]) -> float:
        """The threshold of a method with which it spends `nfe` evaluations on the choosing seeds."""
        return tolerance_for(
            nfe, lambda threshold: made(threshold)(self.choosing, self.watched, "output"), self.case, self.choosing
        )

    def cached(self, method: str, made: Made, payload: str, **facts: Any) -> Row:
        cached = made(self.field, self.field, payload)
        end = cached.integrate(self.x, self.ts, self.case.stepper)
        return self.row(method, end, float(cached.report.evaluations.double().mean()), **facts)

    def row(self, method: str, end: Tensor, evaluations: float, **facts: Any) -> Row:
        """A method's means over samples, with their standard errors."""
        pixels = self.case.pixels(end)
        measures = {"PSNR": psnr, "SSIM": ssim, "ST-LPIPS": stlpips}
        values = {name: measure(pixels, self.full).double().cpu() for name, measure in measures.items()}
        self.near[method] = near = values["PSNR"]
        row: Row = {"field": self.case.name, "method": method, **facts}
        row |= {"NFE": evaluations, "cache ratio": 1 - evaluations / (len(self.ts) - 1)}
        for name, value in values.items():
            row |= {name: float(value.mean()), f"{name} SE": float(standard_error(value))}
        return row | {"PSNR median": float(near.median()), "PSNR worst decile": float(near.quantile(0.1))}


def table_1(bench: Bench) -> list[Row]:
    rows: list[Row] = []
    for nfe, n, most in tqdm(BUDGETS[bench.case.name], desc=f"Table 1, {bench.case.name}"):
        rules: dict[str, Callable[[float], Made]] = {
            "TeaCache": bench.teacache,
            "MagCache": lambda tolerance, most=most: bench.magcache(tolerance, most),  # type: ignore[misc]
            "SenCache": lambda tolerance, n=n: bench.sencache(tolerance, n),  # type: ignore[misc]
        }
        thresholds = {name: bench.spending(nfe, made) for name, made in rules.items()}
        settings = [(name, name, "blocks") for name in rules] + [("SenCache, outputs held", "SenCache", "output")]
        found = [
            bench.cached(method, rules[name](thresholds[name]), payload, wanted=nfe, threshold=thresholds[name])
            for method, name, payload in settings
        ]
        ours: Made = lambda field, watched, payload, nfe=nfe: CachedField(  # type: ignore[misc]  # noqa: E731
            field, bench.profile, nfe=nfe, payload=payload
        )
        unset = {"wanted": nfe, "threshold": float("nan")}
        found.append(bench.cached("ours", ours, "output", **unset))
        few = integrate(bench.field, bench.x, bench.case.grid(nfe), bench.case.stepper)
        found.append(bench.row("fewer steps", few, nfe, **unset))
        for row in found:
            less = bench.near[row["method"]] - bench.near["SenCache"]
            row |= {"PSNR less SenCache's": float(less.mean()), "SE of that": float(standard_error(less))}
        rows += found
    return rows


def scaled(bench: Bench) -> float:
    """How much larger a tolerance of this field is than the paper's, where .05 spends 25 evaluations at n = 3."""
    return bench.spending(25, lambda tolerance: bench.sencache(tolerance, 3)) / 0.05


def table_2(bench: Bench, scale: float) -> list[Row]:
    made = {n: bench.sencache(0.05 * scale, n) for n in REUSES}
    return [bench.cached("SenCache", made[n], "blocks", n=n, tolerance=0.05 * scale) for n in tqdm(REUSES, "Table 2")]


def table_3(bench: Bench, scale: float) -> list[Row]:
    rows = []
    for paper in tqdm(PAPER_TOLERANCES, desc="Table 3"):
        facts = {"n": 3, "the paper's": paper, "tolerance": paper * scale}
        rows.append(bench.cached("SenCache", bench.sencache(paper * scale, 3), "blocks", **facts))
    return rows


def shown(rows: list[Row], *facts: str) -> list[Row]:
    """Rows as they are to be read."""
    lines = []
    for row in rows:
        line: Row = {name: f"{row[name]:.3g}" if isinstance(row[name], float) else row[name] for name in facts}
        line |= {"NFE": f"{row['NFE']:.1f}", "cache ratio": f"{row['cache ratio']:.0%}"}
        for name, digits in (("PSNR", 1), ("SSIM", 4), ("ST-LPIPS", 4)):
            line[name] = f"{row[name]:.{digits}f} ± {row[f'{name} SE']:.{digits}f}"
        line["PSNR, worst decile"] = f"{row['PSNR worst decile']:.1f}"
        if "SE of that" in row:
            line["less SenCache's"] = f"{row[LESS]:+.1f} ± {row['SE of that']:.1f}"
        lines.append(line)
    return lines


LESS = "PSNR less SenCache's"


def draw() -> None:
    """What the three files hold, PSNR +- 2 SE: methods by field, n, and tolerances."""
    one, two, three = (read(f"paper_table_{number}") for number in (1, 2, 3))
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained", width_ratios=(2, 1, 1))
    places = list(dict.fromkeys((row["field"], row["wanted"]) for row in one))
    methods = list(dict.fromkeys(row["method"] for row in one))
    for number, method in enumerate(methods):
        mine = [row for row in one if row["method"] == method]
        at = [places.index((row["field"], row["wanted"])) + 0.12 * (number - len(methods) / 2 + 0.5) for row in mine]
        bars(axes[0], at, mine, label=method, color=plt.get_cmap("tab10")(number), ls="")
    axes[0].set_xticks(range(len(places)), [f"{TITLES[field]}, {wanted} of 50" for field, wanted in places])
    axes[0].set_ylabel("PSNR to all 50 evaluations (dB)")
    axes[0].set_title("Table 1")
    axes[0].legend(fontsize=9, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    for axis, rows, name, title in (
        (axes[1], two, "n", "Table 2: SenCache on Wan"),
        (axes[2], three, "the paper's", "Table 3: n = 3"),
    ):
        bars(axis, [float(row["NFE"]) for row in rows], rows, color=BLUE)
        same = {row["NFE"]: [other[name] for other in rows if other["NFE"] == row["NFE"]] for row in rows}
        span = max(map(float, same)) - min(map(float, same))
        for row in {row["NFE"]: row for row in rows}.values():  # a label a point
            first, *rest = same[row["NFE"]]
            text = f"{'n' if name == 'n' else 'ε'} = {first}" + (f" to {rest[-1]}" if rest else "")
            x, y = float(row["NFE"]), float(row["PSNR"])
            crowded = any(0 < float(other["NFE"]) - x < 0.15 * span for other in rows)  # on the right
            place: dict[str, Any] = {"xytext": (-8, 5), "ha": "right"} if crowded else {"xytext": (8, -12)}
            axis.annotate(text, (x, y), textcoords="offset points", fontsize=9, **place)
        axis.set_xlabel("evaluations of 50")
        axis.margins(x=0.45)
        axis.set_title(title)
    save(figure, "Tables 1 to 3 of the paper, on the fields of video: mean ± 2 SE", "paper_tables")


def bars(axis: Axes, at: list[float], rows: list[Row], **style: Any) -> None:
    near, error = ([float(row[name]) for row in rows] for name in ("PSNR", "PSNR SE"))
    axis.errorbar(at, near, [2 * each for each in error], marker="o", ms=5, capsize=3, **style)


def read(name: str) -> list[Row]:
    """The rows of benchmarks/results/`name`.csv, in strings."""
    with (ROOT / f"benchmarks/results/{name}.csv").open() as file:
        return list(csv.DictReader(file))


def main(tables: list[str], fields: list[str], samples: int) -> None:
    torch.set_grad_enabled(False)
    one: list[Row] = []
    for name, case in available(fields if "1" in tables else ["wan"]).items():
        bench = Bench(case, samples)
        if "1" in tables:
            found = table_1(bench)
            one += found
            write("paper_table_1", one)
            publish("paper_table_1", {f"Table 1, {samples} videos": shown(one, "field", "method")})
        if name == "wan" and {"2", "3"} & set(tables):
            scale = scaled(bench)
            if "2" in tables:
                rows = table_2(bench, scale)
                write("paper_table_2", rows)
                publish("paper_table_2", {f"Table 2, tolerance {0.05 * scale:.3g}, {samples} videos": shown(rows, "n")})
            if "3" in tables:
                rows = table_3(bench, scale)
                write("paper_table_3", rows)
                table = shown(rows, "the paper's", "tolerance")
                publish("paper_table_3", {f"Table 3, n = 3, {samples} videos": table})
    draw()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[[], "1", "2", "3"], help="which tables (default all)")
    parser.add_argument("--fields", nargs="+", default=list(BUDGETS), choices=list(BUDGETS))
    parser.add_argument("--samples", type=int, default=16, help="how many videos to report on (default 16)")
    given = parser.parse_args()
    main(given.tables or ["1", "2", "3"], given.fields, given.samples)
