"""One row of a comparison, what it is written to, and where it was measured: shared by all tables.

Shapes: per-sample numbers (B,).
"""

from __future__ import annotations

import csv
import math
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "sencache")


class Result(NamedTuple):
    """One method on one field: medians over samples; NaN where something was not measured.

    Distances are to the full run of the same sampler, in dB, 1 and 0 at best; `psnr_true` is to the true solution.
    """

    field: str
    method: str
    nfe: int  # what was asked for; 0 where a rule decides
    evaluations: float  # a sample, counted: evaluated steps, guidance included in each
    psnr: float
    psnr_p10: float  # of the worst decile
    psnr_se: float  # standard error of the mean
    ssim: float
    stlpips: float
    psnr_true: float
    seconds: float  # a sample


def summary(
    field: str,
    method: str,
    nfe: int,
    *,
    evaluations: Any,
    psnr: Any,
    ssim: Any = (),
    stlpips: Any = (),
    psnr_true: Any = (),
    seconds: Any = (),
) -> Result:
    """The row of a method from the numbers (B,) of its samples, each of them a tensor or a sequence; or none, ()."""
    near = _values(psnr)
    return Result(
        field, method, nfe, median(evaluations), median(psnr), decile(psnr),
        0.0 if (near == math.inf).all() else float(near.std() / math.sqrt(len(near))) if len(near) > 1 else math.nan,
        median(ssim), median(stlpips), median(psnr_true), median(seconds),
    )  # fmt: skip


def median(values: Any) -> float:
    """The middle value, or the mean of the two middle ones; NaN of none."""
    ordered = _values(values).sort().values
    return float((ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2) if len(ordered) else math.nan


def decile(values: Any) -> float:
    """The largest value that at most a tenth of the samples lie below; NaN of none."""
    found = _values(values)
    return float(found.quantile(0.1, interpolation="lower")) if len(found) else math.nan


def write(rows: Iterable[Result], file: str | Path) -> None:
    """Rows as CSV, with a header; NaN is an empty cell."""
    with Path(file).open("w", newline="", encoding="utf-8") as target:
        table = csv.writer(target)
        table.writerow(Result._fields)
        table.writerows([_cell(value) for value in row] for row in rows)


def read(file: str | Path) -> list[Result]:
    """The rows that `write` wrote."""
    with Path(file).open(newline="", encoding="utf-8") as source:
        lines = list(csv.DictReader(source))
    return [
        Result(line["field"], line["method"], int(line["nfe"]), *(_number(line[name]) for name in Result._fields[3:]))
        for line in lines
    ]


def markdown(rows: Iterable[Result]) -> str:
    """Rows as a Markdown table; columns that nothing was measured for are left out."""
    rows = list(rows)
    columns: dict[str, tuple[str, str]] = {
        "evaluations": ("evaluations", ".4g"), "psnr": ("PSNR (dB): median", ".1f"),
        "psnr_p10": ("worst decile", ".1f"), "psnr_se": ("SE", ".1f"),
        "ssim": ("SSIM", ".4f"), "stlpips": ("ST-LPIPS", ".4f"),
        "psnr_true": ("PSNR to the truth", ".1f"), "seconds": ("seconds", ".3g"),
    }  # fmt: skip
    shown = [name for name in columns if any(not math.isnan(getattr(row, name)) for row in rows)]
    lines = [["field", "method", *(columns[name][0] for name in shown)], ["---"] * (len(shown) + 2)]
    for row in rows:
        values = [(getattr(row, name), columns[name][1]) for name in shown]
        cells = ["" if math.isnan(x) else "∞" if math.isinf(x) else format(x, how) for x, how in values]
        lines.append([row.field, row.method, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def environment() -> dict[str, Any]:
    """Where numbers are made: versions, hardware, and the commit of this code ("+" with changes), None if unknown."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
        "cuda": torch.version.cuda if cuda else None,
        "cpu": _processor(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "commit": _commit(),
    }


def _values(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64).detach().cpu().flatten()


def _cell(value: Any) -> Any:
    return "" if isinstance(value, float) and math.isnan(value) else value


def _number(text: str) -> float:
    return float(text) if text else math.nan


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The CPU's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} threads" if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None
