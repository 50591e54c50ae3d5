"""Strips of the video models' samples, in full and with 15 of 50 evaluations, and their training: docs/videos.png.

python -m benchmarks.fields.strips
"""

from __future__ import annotations

import csv

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from torch import Tensor

from benchmarks.cases import Case, cases
from benchmarks.fields.bunny import HERE, clips, film
from benchmarks.fields.video import FAMILIES
from sencache import CachedField
from solvers import integrate

SCENES, NFE = 4, 15
TITLES = {"wan": "Wan", "ltx": "LTX", "cogvideox": "CogVideoX"}


def strip(clip: Tensor) -> Tensor:
    """Every other frame of a clip (3, F, H, W) side by side, as an image (H, F W / 2, 3) in [0, 1]."""
    return torch.cat(list(clip[:, ::2].unbind(1)), dim=-1).permute(1, 2, 0) / 2 + 0.5


def rows_of(case: Case) -> list[tuple[str, Tensor]]:
    """Strips with what they are: of each scene a clip of the film, the full sample, ours."""
    field, x, _ = case.samples(SCENES, "choosing")
    full = case.pixels(integrate(field, x, case.grid(), case.stepper))
    ours = case.pixels(CachedField(field, case.profile, nfe=NFE).integrate(x, case.grid(), case.stepper))
    known, scene, _, _ = clips(film())
    first = [int((scene == each).nonzero()[0]) for each in case.conditions(SCENES, "choosing").cpu()]
    named = {"the film": known[first], "50 evaluations": full, f"{NFE} evaluations": ours}
    return [(name, strip(part[number])) for number in range(SCENES) for name, part in named.items()]


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    height = 3 * SCENES
    figure, axes = plt.subplots(
        height + 1, 3, figsize=(15, 14), layout="constrained", height_ratios=[1.0] * height + [4.5]
    )
    for column, family in enumerate(FAMILIES):
        for axis, (name, image) in zip(axes[:, column], rows_of(cases()[family]), strict=False):
            axis.imshow(image, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if column == 0:
                axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axes[0, column].set_title(TITLES[family])
        with (HERE / f"{family}.csv").open(newline="") as file:
            log = list(csv.DictReader(file))[1:]
        for value, style in (("loss", "-"), ("held_out", "-o")):
            axes[-1, column].plot(
                [int(row["step"]) for row in log],
                [float(row[value]) for row in log],
                style,
                label=value.replace("_", " "),
                ms=3,
            )
        axes[-1, column].set_xlabel("step")
        axes[-1, column].set_ylabel("squared error of the velocity" if column == 0 else "")
        axes[-1, column].grid(alpha=0.3)
        axes[-1, column].legend(frameon=False)
    figure.savefig(HERE.parent.parent / "docs/videos.png", dpi=90)
