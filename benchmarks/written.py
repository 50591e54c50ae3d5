"""Rows as CSV in benchmarks/results, as Markdown on the screen and in the page about them; pictures as PNG in docs."""

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
PAGE = ROOT / "docs/paper_reproduced.md"
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


def publish(name: str, tables: dict[str, list[Row]], file: Path | None = None) -> None:
    """Print rows under their titles, and put them into a page between the marks of `name`.

    Their values are as they are to be read, in strings. file: the page, by default docs/paper_reproduced.md.
    """
    text = "\n\n".join(f"{title}:\n\n{markdown(rows)}" for title, rows in tables.items())
    print(f"\n{text}", flush=True)
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    file = file or PAGE
    page = file.read_text()
    if begin not in page or end not in page:
        raise ValueError(f"{file} has no lines {begin.strip()!r} and {end!r} for the table to go between.")
    before, rest = page.split(begin, 1)
    file.write_text(f"{before}{begin}\n{text}\n\n{end}{rest.split(end, 1)[1]}")


def markdown(rows: list[Row]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _short(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


def standard_error(samples: Tensor) -> Tensor:
    """Of the mean over samples (S, ...)."""
    return samples.std(0) / len(samples) ** 0.5


def save(figure: Figure, title: str, name: str) -> None:
    figure.suptitle(title, fontsize=14)
    figure.savefig(ROOT / f"docs/{name}.png", dpi=110)
    plt.close(figure)
