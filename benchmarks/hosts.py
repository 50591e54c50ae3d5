"""The shipped SiT through the samplers of other people: `python -m benchmarks.hosts` prints the table of docs/hosts.md.

Each sampler's own full run is the reference of its cached runs and of fewer of its steps: PSNR in dB, the median over
images. All begin at the same noise, from the reported seeds, and walk uniform grids in t from 0.999, where
sigma = t / (1 - t) is finite: 50 steps of one evaluation, 25 of two, 12 of four.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torchdiffeq
from torch import Tensor

from benchmarks.metrics import psnr
from benchmarks.shipped import noise, sit_field, sit_profile
from sencache import CachedField, calibrate
from sencache.adapters.sit import SiTField
from sencache.plugins import kdiffusion, sit
from sencache.plugins import torchdiffeq as for_torchdiffeq
from sencache.plugins import torchsde as for_torchsde
from solvers import grids, integrate

START = 0.999
OPTIONS: dict[str, dict[str, Any]] = {
    "hold": dict(reuse="hold"),
    "line": dict(correct=False),
    "repaid": dict(correct=True),
}
WAYS = ("fewer steps", *OPTIONS)
Options = dict[str, Any] | None  # of a cached run; None for the bare one


class Case(NamedTuple):
    """One sampler: its sample of x, and the evaluations an image, on a grid of K steps."""

    name: str
    sample: Callable[[SiTField, Tensor, Tensor, Options], tuple[Tensor, int]]
    stages: int = 1  # evaluations a step
    folds: bool = False  # whether what a gap owed is repaid
    noisy: bool = False  # whether other steps would mean other noise


class Counted:
    """A field that counts, for the bare runs."""

    def __init__(self, field: SiTField):
        self.field, self.calls = field, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.field(x, t)


@contextmanager
def maybe(wrap: Any, model: Any, ts: Tensor, options: Options, **own: Any) -> Iterator[Any]:
    """The model, wrapped where there are options, by default with the shipped profile."""
    if options is None:
        yield model
    else:
        with wrap(model, own.pop("profile", None) or sit_profile(), ts, **own, **options) as wrapped:
            yield wrapped


def by_integrate(field: SiTField, x: Tensor, ts: Tensor, options: Options) -> tuple[Tensor, int]:
    if options is None:
        return integrate(field, x, ts), len(ts) - 1
    cached = CachedField(field, sit_profile(), **options)
    return cached.integrate(x, ts), int(cached.report.evaluations.max())


def by_torchdiffeq(method: str) -> Callable[..., tuple[Tensor, int]]:
    def sample(field: SiTField, x: Tensor, ts: Tensor, options: Options) -> tuple[Tensor, int]:
        counted = Counted(field)
        with maybe(for_torchdiffeq.wrap, lambda t, y: counted(y, t), ts, options, method=method) as func:
            end = torchdiffeq.odeint(func, x, ts.to(x), method=method)[-1]
        return end, counted.calls

    return sample


def by_sit(field: SiTField, x: Tensor, ts: Tensor, options: Options) -> tuple[Tensor, int]:
    """SiT's ODE sampler in its own time, both halves of the guidance in one batch of 2B."""
    counted, up = Counted(field), (1 - ts).to(x)

    def forward_with_cfg(x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        half = len(x) // 2
        v = -counted(x[:half], 1 - t[:half])
        return torch.cat([v, v])

    y = torch.cat([field.y, torch.full_like(field.y, field.null)])
    with maybe(sit.wrap, forward_with_cfg, up, options) as model:

        def drift(t: Tensor, x: Tensor) -> Tensor:
            return model(x, torch.ones(len(x)).to(x) * t, y=y, cfg_scale=field.guidance)

        end = torchdiffeq.odeint(drift, torch.cat([x, x]), up, method="euler")[-1]
    return end[: len(x)], counted.calls


def by_k_diffusion(name: str, method: str | None) -> Callable[..., tuple[Tensor, int]]:
    def sample(field: SiTField, x: Tensor, ts: Tensor, options: Options) -> tuple[Tensor, int]:
        counted, sigmas = Counted(field), (ts / (1 - ts)).to(x)
        more = {}
        if name.endswith("_sde"):  # its own Brownian tree takes its seed from nowhere
            more["noise_sampler"] = lambda sigma, sigma_next: torch.randn_like(x)

        def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
            scale = (1 + sigma)[:, None, None, None]
            t = sigma / (1 + sigma)
            return x / scale - t[:, None, None, None] * counted(x / scale, t)

        sampler = getattr(k_diffusion_sampling(), f"sample_{name}")
        with maybe(kdiffusion.wrap, denoiser, sigmas, options, method=method) as model, torch.random.fork_rng():
            torch.manual_seed(0)
            end = sampler(model, x * (1 + sigmas[0]), sigmas, disable=True, **more)
        return end, counted.calls

    return sample


class FlowSDE:
    """dx = (-v - noise / 4) dt + sqrt(u / 2) dW with u = 1 - t, which has the marginals of the flow v(x, u)."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, field: Any):
        self.field = field

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        x, u = y.reshape(-1, 1, 32, 32), 1 - t
        v = self.field(x, u)
        return (-v - (x + (1 - u) * v) / 4).flatten(1)  # w / 2 times the score, which is -noise / u

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return ((1 - t) / 2).sqrt().expand_as(y)


def by_torchsde(field: SiTField, x: Tensor, ts: Tensor, options: Options) -> tuple[Tensor, int]:
    """The flow's SDE with w / 2 = t / 4 in the papers' time, upward in SiT's; its drift has a profile of its own."""
    import torchsde

    counted, up = Counted(field), (1 - ts).to(x)
    profile = None
    if options is not None:
        drift, own = for_torchsde.field(FlowSDE(sit_field(8))), noise(8, "calibration").flatten(1)
        profile = calibrate(drift, own, up, secants=False, progress=False)
    brownian = torchsde.BrownianInterval(0.0, 1.0, (len(x), 1024), entropy=0)
    with maybe(for_torchsde.wrap, FlowSDE(counted), up, options, profile=profile) as sde:
        step = float(up[1] - up[0])
        end = torchsde.sdeint(sde, x.flatten(1), up[[0, -1]], bm=brownian, dt=step, method="euler")[-1]
    return end.reshape(x.shape), counted.calls


CASES = [
    Case("`.integrate`, Euler", by_integrate, folds=True),
    Case("torchdiffeq `euler`", by_torchdiffeq("euler"), folds=True),
    Case("SiT's ODE, `euler`", by_sit, folds=True),
    Case("k-diffusion `sample_euler`", by_k_diffusion("euler", "euler"), folds=True),
    Case(
        "k-diffusion `sample_euler_ancestral`",
        by_k_diffusion("euler_ancestral", "euler_ancestral"),
        folds=True,
        noisy=True,
    ),
    Case("k-diffusion `sample_dpmpp_2m`", by_k_diffusion("dpmpp_2m", "dpmpp_2m")),
    Case("k-diffusion `sample_heun`", by_k_diffusion("heun", "heun"), stages=2),
    Case("k-diffusion `sample_dpmpp_2m_sde`", by_k_diffusion("dpmpp_2m_sde", None), noisy=True),
    Case("k-diffusion `sample_dpmpp_2s_ancestral`", by_k_diffusion("dpmpp_2s_ancestral", None), stages=2, noisy=True),
    Case("k-diffusion `sample_dpmpp_sde`", by_k_diffusion("dpmpp_sde", None), stages=2, noisy=True),
    Case("torchdiffeq `midpoint`", by_torchdiffeq("midpoint"), stages=2),
    Case("torchdiffeq `rk4`", by_torchdiffeq("rk4"), stages=4),
    Case("torchsde `euler`", by_torchsde, folds=True, noisy=True),
]


def grid(case: Case, evaluations: int) -> Tensor:
    return grids.uniform(max(1, evaluations // case.stages), start=START)


def measured(
    case: Case, samples: int, budgets: tuple[int, ...], ways: tuple[str, ...] = WAYS
) -> Iterator[tuple[str, int, Tensor]]:
    """(what was done, evaluations an image, PSNR (samples,) to the full run) of one sampler, where it makes sense."""
    field, x = sit_field(samples), noise(samples, "reported")
    ts = grid(case, 50)
    full, paid = case.sample(field, x, ts, None)
    yield "full", paid, torch.full((samples,), torch.inf)
    for nfe in budgets:
        for way in ways:
            if (way == "fewer steps" and case.noisy) or (way == "repaid" and not case.folds):
                continue
            options = None if way == "fewer steps" else dict(OPTIONS[way], nfe=nfe)
            x_0, paid = case.sample(field, x, grid(case, nfe) if options is None else ts, options)
            yield f"{way} {nfe}", paid, psnr(x_0, full)


def k_diffusion_sampling() -> Any:
    """k-diffusion's `sampling` module, without the rest of the package.

    The package's __init__ imports models, CLIP and torchvision, which samplers need nothing of; `sampling` itself needs
    `utils.append_dims`, and `utils` imports torchvision for two functions on images.
    """
    if "k_diffusion.sampling" in sys.modules:
        return sys.modules["k_diffusion.sampling"]
    spec = find_spec("k_diffusion")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("k-diffusion is not installed: pip install --no-deps k-diffusion==0.1.1.post1")
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    stand_in, transforms = types.ModuleType("torchvision"), types.ModuleType("torchvision.transforms")
    transforms.functional = types.ModuleType("functional")  # type: ignore[attr-defined]
    stand_in.transforms = transforms  # type: ignore[attr-defined]
    added = {"k_diffusion": package}
    if find_spec("torchvision") is None:
        added |= {"torchvision": stand_in, "torchvision.transforms": transforms}
    sys.modules.update(added)
    try:
        return importlib.import_module("k_diffusion.sampling")
    finally:
        for name in set(added) - {"k_diffusion"}:
            del sys.modules[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=32)
    samples, budgets = parser.parse_args().samples, (25, 15)
    ways = [f"{way} {nfe}" for nfe in budgets for way in WAYS]
    print("| sampler | full | " + " | ".join(ways) + " |")
    print("|" + "---|" * (len(ways) + 2))
    with torch.no_grad():
        for case in CASES:
            found = {way: (paid, values) for way, paid, values in measured(case, samples, budgets)}
            cells = [case.name, str(found["full"][0])]
            for way in ways:
                paid, values = found.get(way, (0, torch.full((1,), torch.nan)))
                extra = "" if paid in (0, int(way.split()[-1])) else f" ({paid})"
                cells.append(f"{values.median():.1f}{extra}" if paid else "")
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
