"""Measure a field's sensitivities once: the secants of Eqs. 11 and 12, and the Gram matrix of its outputs.

The sampler's own evaluations, and two more a step and sample that the equations add to its f(x, t): f(x + dx, t) with
dx the sampler's own step, and f(x, t + dt). The Gram matrix comes free with the first.

Shapes: S calibration samples, K steps; x (S, ...), ts (K + 1,).
"""

from __future__ import annotations

import hashlib
import os
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path as File

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sencache.cache import check_bare
from sencache.norms import Norm, difference, rms
from sencache.profile import SensitivityProfile, check_folder
from solvers import Euler, Path, Stepper, VelocityField
from solvers.loop import check_grid, check_state, check_stepper, contract

EULER = Euler()


def calibrate(
    field: VelocityField,
    x: Tensor,
    ts: Tensor,
    stepper: Stepper = EULER,
    *,
    path: Path | None = None,
    generator: torch.Generator | None = None,
    secants: bool = True,
    norm: Norm = rms,
    file: str | File | None = None,
    progress: bool = True,
) -> SensitivityProfile:
    """Measure `field` along its own trajectories from x (S, ...) at ts[0], stepped over ts (K + 1,) by `stepper`.

    With `path`, x are data instead and each step begins at these data noised along the path, one noise a sample (from
    `generator`, by default seeded with 0): the paper's way, which needs a data set. The paper uses 8 samples.

    Without `secants` the two extra evaluations are spared: the profile has its Gram matrix, all that plans need but for
    stiff fields, and no sensitivities, so that under `tolerance` it evaluates everything.

    A field with `select(rows)` is measured one sample at a time, any other all at once. With `file`, the profile of the
    samples so far is written there after each of these, and the same call again goes on from it, or returns it if it
    is complete; of a field without `select` every output is kept beside it until then, as `file.0`, `file.1`, ...
    A field is known by its `fingerprint`, and without one by its first output alone: name another file where only
    later ones differ. K outputs of a sample are held on the host meanwhile. `norm` is of the sensitivities; the Gram
    matrix, and so plans, count every element.

    Raises ValueError for a grid or a batch that cannot be measured, and where `file` holds another measurement.
    """
    check_bare(field)
    check_state(x)
    check_stepper(stepper)
    ts = check_grid(ts)
    if file is not None:
        check_folder(file)
    if stepper.adaptive:
        raise ValueError(f"Calibrate with a fixed-step method; {stepper} chooses its own steps.")
    if file is not None and hasattr(stepper, "noise"):
        raise ValueError(
            "The noise of a stochastic sampler goes on from where its generator stands, so that a measurement cannot "
            "be continued: leave out `file`, and save the profile at the end."
        )
    noise = None
    if path is not None:
        source = generator or torch.Generator().manual_seed(0)
        noise = torch.randn(x.shape, generator=source, device=source.device, dtype=x.dtype).to(x)
    facts = {
        "fingerprint": getattr(field, "fingerprint", None),
        "along": "its own trajectories" if path is None else "forward-noised data",
        "path": str(path or getattr(field, "path", None)),
        "stepper": str(stepper),
        "grid": f"{len(ts) - 1} steps from {ts[0]:g} to {ts[-1]:g}",
        "shape": list(x.shape[1:]),
        "samples": len(x),
        "sencache": version("sencache"),
        "secants": secants,
        "inputs": _digest(x, ts, noise, norm(x)),
    }
    done = _resumed(file, facts)
    select = getattr(field, "select", None) if not hasattr(stepper, "noise") else None  # a Brownian path has all rows
    if done and facts["fingerprint"] is None:
        with torch.no_grad():
            start = x if noise is None or path is None else path.sample(x, noise, ts[0])
            y = select(torch.tensor([0], device="cpu"))(start[:1], ts[0]) if select else field(start, ts[0])[:1]
        _check_output(y, done[0][2][0, 0, 0], file)
    every = torch.arange(len(x), device="cpu")
    groups = every.split(1) if select else [every]
    with torch.no_grad(), tqdm(total=len(x) * (len(ts) - 1), desc="calibrate", disable=not progress) as bar:
        bar.update(sum(len(part[0]) for part in done) * (len(ts) - 1))
        for rows in groups[len(done) :]:
            one = contract(select(rows) if select else field)
            own_noise = None if noise is None else noise[rows]
            kept = (
                _Kept(one, file, f"{facts['fingerprint']} {stepper} {facts['inputs']}") if file and not select else None
            )
            done.append(_measure(kept or one, x[rows], ts, stepper, path, own_noise, norm if secants else None, bar))
            if file is not None:
                _profile(done, ts, facts).save(file)
            if kept:
                kept.remove()
    return _profile(done, ts, facts)


def _measure(
    field: VelocityField,
    x: Tensor,
    ts: Tensor,
    stepper: Stepper,
    path: Path | None,
    noise: Tensor | None,
    norm: Norm | None,
    bar: tqdm,
) -> tuple[Tensor, ...]:
    """alpha_x (G, K), alpha_t (G, K), the Gram matrix (G, T, T) and the final size (G,) of a group of G samples.

    T is K, or K + 1 of a stepper that asks at the grid's end too.
    """
    data, memory = x, None
    alpha_x, alpha_t, outputs = [], [], []
    for t, t_next in pairwise(ts):
        if path is not None and noise is not None:
            x, memory = path.sample(data, noise, t), None
        first = _Step(field)
        dx, memory = stepper.advance(first, x, t, t_next, memory)
        y, dt = first.output, (t_next - t).abs().item()
        if norm is None:
            alpha_x.append(torch.full((len(x),), torch.nan, dtype=torch.float64, device="cpu"))
            alpha_t.append(alpha_x[-1])
        else:
            alpha_x.append(norm(difference(field(x + dx, t), y)).double() / norm(dx).double())  # Eq. 11
            alpha_t.append(norm(difference(field(x, t_next), y)).double() / dt)  # Eq. 12
        outputs.append(y.reshape(len(y), -1).double().cpu())
        x = x + dx
        bar.update(len(x))
    if first.last_t == ts[-1]:
        outputs.append(first.last.reshape(len(x), -1).double().cpu())
    size = rms(x.double()).cpu()
    secants = [torch.stack(alpha, 1).cpu() for alpha in (alpha_x, alpha_t)]
    unmeasured = [alpha.masked_fill(~alpha.isfinite(), torch.nan) for alpha in secants]  # dx = 0 says nothing
    y = torch.stack(outputs, 1)  # (G, T, d)
    return unmeasured[0], unmeasured[1], y @ y.mT / y.shape[2], size


def _profile(done: list[tuple[Tensor, ...]], ts: Tensor, facts: dict) -> SensitivityProfile:
    x, t, gram, size = (torch.cat(parts) for parts in zip(*done, strict=True))
    return SensitivityProfile(ts[:-1], x.nanmean(0), t.nanmean(0), x, t, gram, size, ts[-1].double().cpu(), facts=facts)


class _Step:
    """A field that keeps its first output, the sampler's own f(x, t) however many stages a step has, and its last."""

    output: Tensor
    last: Tensor
    last_t: Tensor

    def __init__(self, field: VelocityField):
        self.field = field

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        v = self.field(x, t)
        self.last, self.last_t = v.clone(), t
        if not hasattr(self, "output"):
            self.output = self.last
        return v


class _Kept:
    """A field whose outputs are kept, a file each: asked for the same ones again in the same order, it reads them.

    The first is evaluated all the same, and must be what it was: a field without a fingerprint may be another.
    """

    def __init__(self, field: VelocityField, file: str | File, label: str):
        self.field, self.file, self.label, self.count = field, file, label, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        name, number = File(f"{self.file}.{self.count}"), self.count
        self.count += 1
        if not name.exists():
            v = self.field(x, t)
            save_file({"v": v.contiguous()}, f"{name}.partial", {"label": self.label})
            os.replace(f"{name}.partial", name)
            return v
        with safe_open(name, "pt") as kept:
            v, label = kept.get_tensor("v").to(x), (kept.metadata() or {}).get("label")
        if label != self.label or (number == 0 and not torch.allclose(self.field(x, t), v, rtol=1e-3, atol=1e-6)):
            raise ValueError(
                f"{name} holds another measurement, which differs in its inputs or first output. Name another file, or "
                "remove it."
            )
        return v

    def remove(self) -> None:
        """Forget what was kept."""
        for number in range(self.count):
            File(f"{self.file}.{number}").unlink(missing_ok=True)


def _resumed(file: str | File | None, facts: dict) -> list[tuple[Tensor, ...]]:
    """What an earlier call with the same inputs has already measured, sample by sample."""
    if file is None or not File(file).exists():
        return []
    before = SensitivityProfile.load(file)
    measured = before.samples_x, before.samples_t, before.gram, before.size
    if dict(before.facts) != facts:
        other = {name: before.facts.get(name) for name in facts if before.facts.get(name) != facts[name]}
        raise ValueError(
            f"{file} holds another measurement, which differs in {other}. Name another file, or remove it."
        )
    return list(zip(*(part.split(1) for part in measured if part is not None), strict=True))


def _check_output(y: Tensor, square: Tensor, file: object) -> None:
    """Raise where a field without a fingerprint does not give the output that the file begins with."""
    now = rms(y.double()).square().cpu()
    if not torch.allclose(now, square.expand_as(now), rtol=1e-3):
        raise ValueError(
            f"{file} holds another measurement, which differs in its first output. Name another file, or remove it."
        )


def _digest(*inputs: Tensor | None) -> str:
    """Tells measurements apart, so that none goes on with another's values."""
    digest = hashlib.sha256()
    for value in inputs:
        if value is not None:
            digest.update(value.detach().double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
