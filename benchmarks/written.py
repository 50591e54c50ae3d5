"""Rows as CSV in benchmarks/results and as Markdown on the screen, pictures as PNG in docs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

ROOT = Path(__file__).parent.parent
Row = dict[str, Any]
TITLES = {"sit": "SiT, images", "wan": "Wan", "ltx": "LTX", "cogvideox": "CogVideoX"}
BLUE, RED, GREY = "#1f4e79", "#c0504d", "0.45"
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})


def write(name: str, rows: list[Row]) -> None:
    """benchmarks/results/`name`.csv, numbers to five significant digits."""
    with (ROOT / f"benchmarks/results/{name}.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows({key: _short(value) for key, value in row.items()} for row in rows)


def print_markdown(title: str, rows: list[Row]) -> None:
    """The rows under their keys; numbers come as they are to be read, in strings."""
    print(f"\n{title}\n\n| {' | '.join(rows[0])} |\n{'|---' * len(rows[0])}|")
    for row in rows:
        print(f"| {' | '.join(str(value) for value in row.values())} |", flush=True)


def _short(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


def standard_error(samples: Tensor) -> Tensor:
    """Of the mean over samples (S, ...)."""
    return samples.std(0) / len(samples) ** 0.5


def save(figure: Figure, title: str, name: str) -> None:
    figure.suptitle(title, fontsize=14)
    figure.savefig(ROOT / f"docs/{name}.png", dpi=110)
    plt.close(figure)
