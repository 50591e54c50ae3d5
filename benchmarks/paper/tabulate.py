"""The tables of a folder that `benchmarks.paper.sample` filled: every video beside the full run of its prompt and seed.

    python -m benchmarks.paper.tabulate --out OUT
    torchrun --nproc-per-node 8 -m benchmarks.paper.tabulate --out OUT

Writes table.csv, table.md and environment.json there. Distances are kept beside the videos, and computed once.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks import metrics
from benchmarks.paper.folder import Folder, Ranks, load_unit, write_text
from benchmarks.paper.methods import REFERENCE, TRUE, Method, methods
from benchmarks.paper.models import MODELS
from benchmarks.results import Result, environment, markdown, median, summary, write
from benchmarks.stlpips import CACHE, WHEEL, fetch
from sencache import rms


def psnr(video: Tensor, reference: Tensor) -> float:
    """Of all pixels of a video (F, H, W, 3) uint8 together, in dB; infinite for the same video."""
    squares = [rms(frame - other).double().square() for frame, other in pairs(video, reference)]
    return float(20 * torch.log10(metrics.RANGE / torch.stack(squares).mean().sqrt()))


def ssim(video: Tensor, reference: Tensor) -> float:
    """The mean over frames."""
    return float(torch.stack([metrics.ssim(*pair) for pair in pairs(video, reference)]).mean())


def stlpips(video: Tensor, reference: Tensor) -> float:
    """The mean over frames."""
    return float(torch.stack([metrics.stlpips(*pair) for pair in pairs(video, reference)]).mean())


DISTANCES = {"psnr": psnr, "ssim": ssim, "stlpips": stlpips}


def distances(ranks: Ranks) -> list[str]:
    """Which of them can be measured: ST-LPIPS needs weights, which the first rank fetches for all."""
    if ranks.number == 0 and "stlpips" in DISTANCES:
        try:
            fetch()
        except RuntimeError as error:
            print(f"Without ST-LPIPS. {error}", file=sys.stderr)
    ranks.wait()
    return [name for name in DISTANCES if name != "stlpips" or (CACHE / WHEEL).exists()]


def pairs(video: Tensor, reference: Tensor) -> Any:
    """Frame by frame, two images (1, 3, H, W) in [-1, 1]."""
    if video.shape != reference.shape:
        raise ValueError(f"Expected videos of one shape; got {tuple(video.shape)} and {tuple(reference.shape)}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for both in zip(video, reference, strict=True):
        yield tuple(frame.to(device).movedim(2, 0)[None].float() / 127.5 - 1 for frame in both)


def measure(folder: Folder, names: list[str], method: str, number: int) -> dict[str, float]:
    """How far a video is from the full run's, and the truth's where there is one."""
    file = folder.unit(method, number)
    kept = file.with_suffix(".json")
    found: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    true = folder.unit(TRUE, number)
    wanted = [name for name in names if name not in found]
    truly = "psnr_true" not in found and true.exists()
    if wanted or truly:
        video, reference = load_unit(file).video, load_unit(folder.unit(REFERENCE, number)).video
        found |= {name: DISTANCES[name](video, reference) for name in wanted}
        if truly:
            found["psnr_true"] = psnr(video, load_unit(true).video)
        write_text(kept, json.dumps(found))
    return found


def row(folder: Folder, names: list[str], field: str, name: str, method: Method, numbers: list[int]) -> Result:
    """The row of a method over the prompts of these numbers, with the distances of these names."""
    measured = [measure(folder, names, name, number) for number in numbers]
    spent = [facts(folder.unit(name, number)) for number in numbers]
    columns = {key: [one[key] for one in measured] for key in names}
    if all("psnr_true" in one for one in measured):
        columns["psnr_true"] = [one["psnr_true"] for one in measured]
    costs = {key: [one[key] for one in spent] for key in ("evaluations", "seconds")}
    return summary(field, name, method.nfe, **columns, **costs)


def facts(file: Path) -> dict[str, Any]:
    """What a video cost, without the video."""
    with safe_open(file, "pt") as source:
        found: dict[str, Any] = json.loads((source.metadata() or {})["facts"])
    return found


def tabulate(options: argparse.Namespace) -> None:
    """Measure this rank's share; then the first rank writes the tables."""
    folder, ranks = Folder(options.out), Ranks()
    settings = folder.read()["settings"]
    known = methods(MODELS[settings["model"]], settings["steps"])
    there = {name: folder.numbers(name) for name in known}
    sampled = {name: found for name, found in there.items() if found}
    common = sorted(set.intersection(*sampled.values())) if REFERENCE in sampled else []
    if not common:
        raise ValueError(f"No prompt in {folder.path} was sampled by every method that is there: sample them first.")
    names = distances(ranks)
    for name, number in ranks.share([(name, number) for name in sampled for number in common]):
        measure(folder, names, name, number)
    ranks.wait()
    if ranks.number == 0:
        rows = [row(folder, names, settings["model"], name, known[name], common) for name in sampled]
        write(rows, folder.path / "table.csv")
        text = f"{markdown(rows)}\n\n{note(folder, list(sampled), common)}\n"
        write_text(folder.path / "table.md", text)
        here = {"sampled": folder.read()["environment"], "tabulated": environment()}
        write_text(folder.path / "environment.json", json.dumps(here, indent=2) + "\n")
        print(text)
    ranks.wait()
    ranks.leave()


def note(folder: Folder, names: list[str], common: list[int]) -> str:
    """Under the table: of how many prompts it is, on what, and in how much memory."""
    units = {name: [facts(folder.unit(name, number)) for number in common] for name in names}
    devices = sorted({one["device"] for found in units.values() for one in found})
    text = (
        f"{len(common)} prompts on {', '.join(devices)}. Distances are to `{REFERENCE}`, of the same prompt and seed."
    )
    peaks = {name: median([one["peak_memory"] or math.nan for one in found]) / 1e9 for name, found in units.items()}
    largest = max(peaks, key=lambda name: peaks[name])
    if math.isfinite(peaks[largest]):
        text += f" Peak memory: {peaks[REFERENCE]:.1f} GB in full, at most {peaks[largest]:.1f} GB (`{largest}`)."
    left_out = [f"`{name}`" for name in names if len(folder.numbers(name)) > len(common)]
    return text + (f" Left out: prompts that not every method has, of {', '.join(left_out)}." if left_out else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2, and one line, for what a user can get wrong."""
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks.paper.tabulate", description=__doc__, formatter_class=how)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="that `benchmarks.paper.sample` wrote to")
    try:
        tabulate(parser.parse_args(arguments))
    except ValueError as error:
        print(f"benchmarks.paper.tabulate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
