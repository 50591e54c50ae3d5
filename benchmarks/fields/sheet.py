"""A sheet of the shipped SiT's samples, a class a column, and of its training: docs/samples.png.

python -m benchmarks.fields.sheet
"""

from __future__ import annotations

import csv

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt

from benchmarks.fields.data import CLASSES
from benchmarks.shipped import FIELDS, GRID, noise, sit_field
from solvers import integrate

if __name__ == "__main__":
    images = integrate(sit_field(80), noise(80, "choosing"), GRID)
    sheet = images.reshape(8, 10, 32, 32).permute(0, 2, 1, 3).reshape(256, 320).clamp(-1, 1).cpu()
    with (FIELDS / "sit.csv").open(newline="") as file:
        log = list(csv.DictReader(file))
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", width_ratios=[1.7, 1])
    left.imshow(sheet, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    left.set_xticks(torch.arange(10) * 32 + 16, CLASSES, fontsize=8)
    left.set_yticks([])
    for column, style in (("loss", "-"), ("held_out", "-o")):
        right.plot(
            [int(row["step"]) for row in log],
            [float(row[column]) for row in log],
            style,
            label=column.replace("_", " "),
        )
    right.set_xlabel("step")
    right.set_ylabel("mean squared error of the velocity")
    right.legend(frameon=False)
    figure.savefig(FIELDS.parent.parent / "docs/samples.png", dpi=110)
