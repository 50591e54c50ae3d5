"""Figures 3a, 4 and 5 of the SenCache paper and its Section 4.4, on the fields that ship (Fig. 3b is `timesteps`).

    python -m benchmarks.paper_figures [3a 4 5 terms] [--fields sit wan ...] [--samples 64]

3a and 4 are of the SiT: `--samples` of the calibration seeds are measured, and groups of 16 and of 8 beside all of
them; a quarter as many of the reported seeds are made for 4. 5 and terms are of every field whose checkpoint and
profile are there, on up to 64 of `--samples` of the reported seeds. Writes docs/paper_*.png,
benchmarks/results/paper_*.csv and the tables of docs/paper_reproduced.md, which it prints too.
Shapes: S samples; K steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor
from tqdm import tqdm

from benchmarks.cases import Case, cases
from benchmarks.metrics import psnr
from benchmarks.paper_terms import figure_terms
from benchmarks.recorded import Recording, recorded, tolerance_for
from benchmarks.shipped import FIELDS
from benchmarks.terms import THIRDS
from benchmarks.written import BLUE, GREY, RED, ROOT, TITLES, Row, publish, save, standard_error, write
from sencache import CachedField, SensitivityProfile, calibrate
from sencache.norms import difference
from solvers import integrate

FIGURES = ("3a", "4", "5", "terms")
NFE, GROUPS = 25, 4  # of Fig. 4: evaluations, and calibrations on 8 samples with which samples are made


def measured(samples: int) -> SensitivityProfile:
    """The SiT calibrated on many samples of the calibration seeds, all at once."""
    case = cases()["sit"]
    field, x, _ = case.samples(samples, "calibration")
    return calibrate(lambda x, t: field(x, t), x, case.grid(), case.stepper)


def subset(profile: SensitivityProfile, rows: slice) -> SensitivityProfile:
    """The profile that calibration on these of its samples would have made."""
    assert profile.samples_x is not None
    assert profile.samples_t is not None
    assert profile.gram is not None
    assert profile.size is not None
    x, t = profile.samples_x[rows], profile.samples_t[rows]
    kept: dict[str, Any] = {"samples_x": x, "samples_t": t, "gram": profile.gram[rows], "size": profile.size[rows]}
    return replace(profile, alpha_x=x.nanmean(0), alpha_t=t.nanmean(0), **kept)


def groups(profile: SensitivityProfile, size: int) -> list[SensitivityProfile]:
    """Calibrations on `size` samples each that have none in common."""
    assert profile.size is not None
    whole = len(profile.size) // size
    return [subset(profile, slice(size * g, size * (g + 1))) for g in range(whole)]


def figure_3a(many: SensitivityProfile) -> None:
    """||J_x||(t) and ||J_t||(t) of 16 samples beside those of many."""
    few, figure = groups(many, 16), plt.figure(figsize=(11, 4.2), layout="constrained")
    assert many.size is not None
    shown: list[Row] = []
    curves: dict[str, Tensor] = {"t": many.t}
    for name, axes in zip(("x", "t"), figure.subplots(1, 2), strict=True):
        samples = getattr(many, f"samples_{name}")
        mean, se = samples.nanmean(0), standard_error(samples)
        means = torch.stack([getattr(group, f"alpha_{name}") for group in few])
        low, high = samples.nanquantile(torch.tensor([0.1, 0.9], dtype=samples.dtype), 0)
        axes.fill_between(many.t, low, high, color=BLUE, alpha=0.15, lw=0, label="deciles of single samples")
        for g, curve in enumerate(means):
            label = f"means of 16, {len(few)} times" if g == 0 else None
            axes.plot(many.t, curve, color=RED, lw=0.9, alpha=0.8, label=label)
        axes.errorbar(many.t, mean, 2 * se, color=BLUE, lw=1.8, elinewidth=1, label=f"mean of {len(samples)}, ± 2 SE")
        axes.set(title=rf"$\|J_{name}\|$ (Eq. {11 if name == 'x' else 12})", xlabel="t, from noise to data")
        axes.set_yscale("log")
        axes.set_yticks((1, 2, 5, 10, 20, 50), ["1", "2", "5", "10", "20", "50"])
        axes.minorticks_off()
        axes.invert_xaxis()
        off = (means / mean - 1).abs()
        curves |= {f"J_{name}": mean, f"J_{name}_se": se, f"J_{name}_p10": low, f"J_{name}_p90": high}
        curves |= {f"J_{name}_16": means[0], f"J_{name}_16_least": means.amin(0), f"J_{name}_16_most": means.amax(0)}
        shown.append(
            {
                "sensitivity": f"J_{name}",
                "one sample, relative deviation (SD)": f"{float((samples.std(0) / mean).median()):.1%}",
                "mean of 16 from the mean of all, median over t": f"{float(off.median()):.1%}",
                "worst t, median of groups": f"{float(off.amax(1).median()):.1%}",
                "worst t, worst group": f"{float(off.max()):.1%}",
            }
        )
    figure.axes[0].legend(loc="upper left", fontsize=10)
    save(figure, f"Sensitivities of the SiT: 16 samples beside {len(many.size)}", "paper_3a")
    write("paper_3a", columns(curves))
    publish("paper_3a", {f"{len(few)} groups of 16 beside {len(many.size)} samples": shown})


def figure_4(many: SensitivityProfile, reported: int) -> None:
    """What calibrating on 8 samples instead of many does to the sensitivities, and to `reported` samples."""
    assert many.size is not None
    eights, case = groups(many, 8), cases()["sit"]
    ts, choosing = case.grid(), recorded(case, 16, "choosing")
    field, x, _ = case.samples(reported, "reported")
    full = integrate(field, x, ts, case.stepper)

    def rule(field: Any, profile: SensitivityProfile) -> Callable[[float], CachedField]:
        return lambda tolerance: CachedField(field, profile, tolerance=tolerance, max_reuses=3, reuse="hold")

    epsilon = tolerance_for(NFE, rule(choosing, many), case, choosing)
    methods: dict[str, Callable[[SensitivityProfile], CachedField]] = {
        f"the paper's rule, epsilon = {epsilon:.2f}": lambda profile: rule(field, profile)(epsilon),
        f"our plan, {NFE} evaluations": lambda profile: CachedField(field, profile, nfe=NFE),
    }
    calibrations = {f"all {len(many.size)}": many} | {f"8, group {g + 1}": e for g, e in enumerate(eights[:GROUPS])}
    near: dict[str, list[Tensor]] = {method: [] for method in methods}
    rows: list[Row] = []
    for name, profile in tqdm(calibrations.items(), desc="Fig. 4"):
        away = [float((getattr(profile, a) / getattr(many, a) - 1).square().mean().sqrt()) for a in ALPHAS]
        for method, make in methods.items():
            cached = make(profile)
            near[method].append(psnr(cached.integrate(x, ts, case.stepper), full))
            mine, paired = near[method][-1], near[method][-1] - near[method][0]
            rows.append(
                {
                    "calibrated on": name,
                    "method": method,
                    "J_x off (RMS over t)": away[0],
                    "J_t off (RMS over t)": away[1],
                    "evaluations": float(cached.report.evaluations.double().mean()),
                    "PSNR, mean": float(mine.mean()),
                    "SE": float(standard_error(mine)),
                    "PSNR, median": float(mine.median()),
                    "minus all, paired mean": float(paired.mean()),
                    "SE of that": float(standard_error(paired)),
                }
            )
    draw_4(many, eights, near)
    write("paper_4", rows)
    publish("paper_4", {f"PSNR of {reported} samples to their full runs, dB": [short(row) for row in rows]})


ALPHAS = ("alpha_x", "alpha_t")


def draw_4(many: SensitivityProfile, eights: list[SensitivityProfile], near: dict[str, list[Tensor]]) -> None:
    assert many.size is not None
    figure, axes = plt.subplots(1, 4, figsize=(15, 4.2), layout="constrained", width_ratios=(1.2, 1.2, 1, 1))
    for axis, alpha, name in zip(axes, ALPHAS, ("x", "t"), strict=False):
        every = torch.stack([getattr(group, alpha) for group in eights]) / getattr(many, alpha)
        axis.plot(many.t, every.T, color=RED, lw=0.8, alpha=0.45)
        error = standard_error(getattr(many, f"samples_{name}")) / getattr(many, alpha)
        axis.fill_between(many.t, 1 - 2 * error, 1 + 2 * error, color=BLUE, alpha=0.4, lw=0)
        title = rf"$\|J_{name}\|$: {len(eights)} means of 8 over the mean of {len(many.size)}"
        axis.set(xlabel="t, from noise to data", ylim=(0.75, 1.25))
        axis.set_title(title, fontsize=11)
        axis.invert_xaxis()
    axes[0].fill_between([], [], [], color=BLUE, alpha=0.4, lw=0, label=f"mean of {len(many.size)}, ± 2 SE")
    axes[0].legend(loc="lower left", fontsize=10)
    for axis, (method, values) in zip(axes[2:], near.items(), strict=True):
        paired = [value - values[0] for value in values[1:]]
        means, bars = ([float(of(value)) for value in paired] for of in (torch.mean, standard_error))
        axis.errorbar(range(len(paired)), means, bars, fmt="o", color=BLUE, capsize=4, ms=7)
        axis.axhline(0, color=GREY, lw=0.8, ls=":")
        axis.set_xticks(range(len(paired)), [f"#{g}" for g in range(1, len(values))])
        most = max(0.2, 1.2 * max(abs(mean) + bar for mean, bar in zip(means, bars, strict=True)))
        axis.set(xlim=(-0.5, len(paired) - 0.5), ylim=(-most, most), xlabel="calibration on 8 samples")
        axis.set_title(f"{method}\n({values[0].mean():.1f} dB with all)", fontsize=11)
    axes[2].set_ylabel("PSNR less that with all, dB\n(paired mean ± SE)")
    save(figure, f"Calibrating the SiT on 8 samples instead of {len(many.size)}", "paper_4")


def consecutive(recording: Recording) -> Tensor:
    """Mean absolute difference of each output and the next, (S, K - 1) float64."""
    pairs = zip(recording.y[1:], recording.y[:-1], strict=True)
    return torch.stack([difference(*pair).flatten(1).abs().double().mean(1).cpu() for pair in pairs], 1)


def figure_5(recordings: dict[str, Recording]) -> None:
    """The mean absolute difference of consecutive outputs along t, of each field."""
    size = max(4.4 * len(recordings), 6.5), 4
    figure, axes = plt.subplots(1, len(recordings), figsize=size, layout="constrained", sharey=True)
    rows: list[Row] = []
    shown: list[Row] = []
    for axis, (name, recording) in zip([axes] if len(recordings) == 1 else axes, recordings.items(), strict=True):
        moved, t = consecutive(recording), recording.ts[1:-1].double()
        mean, se = moved.mean(0), standard_error(moved)
        low, high = moved.quantile(torch.tensor([0.1, 0.9], dtype=moved.dtype), 0)
        axis.fill_between(t, low, high, color=BLUE, alpha=0.2, lw=0, label="deciles of samples")
        axis.errorbar(t, mean, 2 * se, color=BLUE, lw=1.6, elinewidth=1, label="mean ± 2 SE")
        axis.set(title=f"{TITLES[name]}, {len(moved)} samples", xlabel="t, from noise to data", yscale="log")
        axis.invert_xaxis()
        values = zip(t.tolist(), mean.tolist(), se.tolist(), low.tolist(), high.tolist(), strict=True)
        heads = ("t", "mean", "se", "p10", "p90")
        rows += [{"field": name, **dict(zip(heads, value, strict=True))} for value in values]
        thirds = [float(part.mean()) for part in mean.tensor_split(3)]
        least = int(mean.argmin())
        shown.append(
            {
                "field": name,
                **{third: f"{value:.4f}" for third, value in zip(THIRDS, thirds, strict=True)},
                "first pair": f"{mean[0]:.4f}",
                "last pair": f"{mean[-1]:.4f}",
                "least": f"{mean[least]:.4f} at t = {t[least]:.2f}",
                "most / least": f"{float(mean.max() / mean.min()):.1f}",
            }
        )
    figure.axes[0].set_ylabel("MAE of consecutive outputs")
    figure.axes[0].legend(fontsize=10)
    save(figure, "How far each output is from the one before it", "paper_5")
    write("paper_5", rows)
    publish("paper_5", {"Mean absolute difference of consecutive outputs": shown})


def short(row: Row) -> Row:
    return {key: f"{value:.2f}" if isinstance(value, float) else value for key, value in row.items()}


def columns(curves: dict[str, Tensor]) -> list[Row]:
    return [
        dict(zip(curves, values, strict=True)) for values in zip(*(c.tolist() for c in curves.values()), strict=True)
    ]


def available(names: list[str]) -> dict[str, Case]:
    """The fields among `names` whose checkpoint and profile are there."""
    found = {}
    for name in names:
        missing = [
            file for file in (f"{name}.safetensors", f"{name}.profile.safetensors") if not (FIELDS / file).exists()
        ]
        if missing:
            print(f"{name} is left out: no {' and no '.join(missing)} in {FIELDS.relative_to(ROOT)}.")
        else:
            found[name] = cases()[name]
    return found


def main(figures: list[str], fields: list[str], samples: int) -> None:
    torch.set_grad_enabled(False)
    if {"3a", "4"} & set(figures):
        many = measured(samples)
        if "3a" in figures:
            figure_3a(many)
        if "4" in figures:
            figure_4(many, samples // 4)
    if {"5", "terms"} & set(figures):
        chosen = tqdm(available(fields).items(), desc="full runs")
        recordings = {name: recorded(case, min(samples, 64), "reported") for name, case in chosen}
        if "5" in figures:
            figure_5(recordings)
        if "terms" in figures:
            figure_terms(recordings)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", choices=[[], *FIGURES], help="which of 3a, 4, 5, terms (default all)")
    parser.add_argument("--fields", nargs="+", default=list(cases()), choices=list(cases()))
    parser.add_argument("--samples", type=int, default=64, help="how many samples to measure (default 64)")
    given = parser.parse_args()
    main(given.figures or list(FIGURES), given.fields, given.samples)
