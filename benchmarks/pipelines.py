"""How close cached diffusers pipelines come to their full runs, beside the same pipelines with fewer steps.

The pipelines are tiny, of diffusers' real classes with random weights whose dependence on time is smooth: this shows
that the arithmetic is right on every scheduler, and says nothing about trained models. `python -m benchmarks.pipelines`
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import diffusers
import torch

import sencache
from benchmarks.tiny_pipelines import cogvideox, flux, ltx, run_cogvideox, run_flux, run_ltx, run_sd3, run_wan, sd3, wan
from sencache.norms import rms

STEPS, SEEDS = 24, range(8)
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[[], Any]]] = {
    "Wan, FlowMatchEuler": (wan, run_wan, lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "Wan, UniPC": (wan, run_wan, lambda: diffusers.UniPCMultistepScheduler.from_config(FLOW)),
    "Wan, DPM-Solver++": (wan, run_wan, lambda: diffusers.DPMSolverMultistepScheduler.from_config(FLOW)),
    "LTX, FlowMatchEuler": (ltx, run_ltx, lambda: None),
    "CogVideoX, DDIM": (cogvideox, run_cogvideox, lambda: None),
    "Flux, FlowMatchEuler": (flux, run_flux, lambda: None),
    "Stable Diffusion 3, FlowMatchEuler": (sd3, run_sd3, lambda: None),
}


def errors(make: Callable[..., Any], run: Callable[..., Any], scheduler: Any) -> dict[str, float]:
    """Median over seeds of the RMS error relative to the full run."""
    pipe, folder = make(scheduler), tempfile.mkdtemp()
    full = [run(pipe, steps=STEPS, seed=seed) for seed in SEEDS]
    found = {}

    def note(name: str, steps: int) -> None:
        samples = [run(pipe, steps=steps, seed=seed) for seed in SEEDS]
        each = [float((rms(x - of) / rms(of)).max()) for x, of in zip(samples, full, strict=True)]
        found[name] = float(torch.tensor(each).median())

    note("half the steps", STEPS // 2)
    sencache.enable(pipe, nfe=STEPS // 2, folder=folder)
    run(pipe, steps=STEPS, seed=1000)  # measures itself
    note("nfe = half", STEPS)
    sencache.enable(pipe, nfe=STEPS // 2, folder=folder, correct=False)
    note("not corrected", STEPS)
    sencache.enable(pipe, nfe=STEPS // 2, folder=folder, reuse="hold")
    note("held", STEPS)
    return found


def main() -> None:
    torch.set_num_threads(1)
    print("| | half the steps | held | extrapolated | **nfe = half** |\n|---|---|---|---|---|")
    for name, (make, run, scheduler) in CASES.items():
        e = errors(make, run, scheduler())
        columns = [e["half the steps"], e["held"], e["not corrected"], e["nfe = half"]]
        print(f"| {name} | " + " | ".join(f"{100 * value:.2g} %" for value in columns) + " |")


if __name__ == "__main__":
    main()
