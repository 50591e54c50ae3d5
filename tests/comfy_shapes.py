"""ComfyUI's call shapes: how a guider samples, batches conditionings and calls the network through its wrappers.

Written from what its `patcher_extension`, `samplers` and `model_base` were read to do; none of its code is here. A
sampler calls `denoise(x, sigma)`; that calls the network once for all conditionings or once for each, as memory allows,
with new context tensors, uuids and `cond_or_uncond` in `transformer_options`, and mixes what comes back.
"""

from __future__ import annotations

import sys
import types
import uuid
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from tests.flows import GaussianFlow


class WrappersMP:
    OUTER_SAMPLE, DIFFUSION_MODEL = "outer_sample", "diffusion_model"


def installed(monkeypatch) -> None:
    """`comfy.patcher_extension`, importable."""
    package, module = types.ModuleType("comfy"), types.ModuleType("comfy.patcher_extension")
    module.WrappersMP = WrappersMP
    monkeypatch.setitem(sys.modules, "comfy", package)
    monkeypatch.setitem(sys.modules, "comfy.patcher_extension", module)


class InterruptProcessingException(Exception):  # noqa: N818, ComfyUI's name
    """What ComfyUI raises where the user presses cancel."""


class Executor:
    """The innermost function behind the wrappers that are left."""

    def __init__(self, original: Callable[..., Any], owner: Any, wrappers: list[Callable[..., Any]]):
        self.original, self.class_obj, self.wrappers = original, owner, wrappers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](Executor(self.original, self.class_obj, self.wrappers[1:]), *args, **kwargs)


class CONST:
    def calculate_input(self, sigma, x):
        return x

    def calculate_denoised(self, sigma, output, x):
        return x - output * sigma


class EPS:
    sigma_data = 1.0

    def calculate_input(self, sigma, x):
        return x / (sigma**2 + self.sigma_data**2) ** 0.5

    def calculate_denoised(self, sigma, output, x):
        return x - output * sigma


class V_PREDICTION(EPS):  # noqa: N801, ComfyUI's name
    def calculate_denoised(self, sigma, output, x):
        return x / (sigma**2 + 1) - output * sigma / (sigma**2 + 1) ** 0.5


class EDM(V_PREDICTION):
    def calculate_denoised(self, sigma, output, x):
        return x / (sigma**2 + 1) + output * sigma / (sigma**2 + 1) ** 0.5


class Network:
    """A diffusion model on a Gaussian flow whose mean is the context; its forward goes through the wrappers."""

    def __init__(self, flow: GaussianFlow, sampling: Any):
        self.flow, self.sampling, self.calls, self.rows = flow, sampling, 0, 0

    def forward(self, x, timesteps, context=None, control=None, transformer_options=None, **kwargs):
        wrappers = transformer_options["wrappers"].get(WrappersMP.DIFFUSION_MODEL, [])
        call = Executor(self._forward, self, wrappers)
        return call(x, timesteps, context, control, transformer_options, **kwargs)

    def _forward(self, x, timesteps, context, control, transformer_options, **kwargs):
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        latent, c = x[:, :2], timesteps[:, None, None, None]
        flow = GaussianFlow(self.flow.path, context, self.flow.std)
        if isinstance(self.sampling, CONST):
            return flow(latent, timesteps)
        scaled, t = latent * (1 + c**2).sqrt() / (1 + c), timesteps / (1 + timesteps)
        data, noise = flow.data(scaled, t), flow.noise(scaled, t)
        return noise if type(self.sampling) is EPS else (noise - c * data) / (1 + c**2).sqrt()


class Model:
    """A ModelPatcher, as far as wrappers go."""

    def __init__(self, network: Network):
        self.network, self.model = network, types.SimpleNamespace(model_sampling=network.sampling)
        self.wrappers: dict[str, dict[str, list]] = {}

    def clone(self) -> Model:
        other = Model(self.network)
        other.wrappers = {kind: {k: list(w) for k, w in keyed.items()} for kind, keyed in self.wrappers.items()}
        return other

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.get(kind, {}).pop(key, None)

    def all_wrappers(self, kind):
        return [wrapper for keyed in self.wrappers.get(kind, {}).values() for wrapper in keyed]


class Guider:
    """A CFGGuider: `sample` goes through OUTER_SAMPLE, and `denoise` makes and mixes the batches."""

    def __init__(self, model: Model, contexts: dict[str, torch.Tensor], cfg: float, static: int = 0):
        self.model_patcher, self.contexts, self.cfg, self.static = model, contexts, cfg, static
        self.uuids = {name: uuid.uuid4() for name in contexts}
        self.together: Callable[[int], bool] = lambda step: True
        self.interrupt_at, self.step = -1, 0

    def sample(self, noise, sampler, sigmas):
        self.step = 0
        call = Executor(self._outer_sample, self, self.model_patcher.all_wrappers(WrappersMP.OUTER_SAMPLE))
        return call(noise, torch.zeros_like(noise), sampler, sigmas, None, None, True, 0)

    def _outer_sample(self, noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed):
        flow = isinstance(self.model_patcher.model.model_sampling, CONST)
        x = noise if flow else noise * (1 + sigmas[0] ** 2).sqrt()
        return sampler.sampler_function(self.denoise, x, sigmas)

    def denoise(self, x, sigma):
        if self.step == self.interrupt_at:
            raise InterruptProcessingException
        names = list(self.contexts)
        groups = [names] if self.together(self.step) else [[name] for name in names]
        self.step += 1
        found = {name: part for group in groups for name, part in zip(group, self._run(group, x, sigma), strict=True)}
        return found["uncond"] + self.cfg * (found["cond"] - found["uncond"]) if "uncond" in found else found["cond"]

    def _run(self, names, x, sigma):
        sampling, network = self.model_patcher.model.model_sampling, self.model_patcher.network
        many, c = torch.cat([sigma] * len(names)), sigma[:, None, None, None]
        options = {
            "uuids": [self.uuids[name] for name in names],
            "cond_or_uncond": [int(name == "uncond") for name in names],
            "sigmas": sigma,
            "wrappers": {WrappersMP.DIFFUSION_MODEL: self.model_patcher.all_wrappers(WrappersMP.DIFFUSION_MODEL)},
        }
        scaled = torch.cat([sampling.calculate_input(c, x)] * len(names))
        if self.static:
            scaled = torch.cat([scaled, torch.full_like(scaled[:, : self.static], 50.0)], 1)
        context = torch.cat([self.contexts[name].expand(len(x), -1, -1, -1) for name in names])
        output = network.forward(scaled, many, context=context, control=None, transformer_options=options)
        return [sampling.calculate_denoised(c, part, x) for part in output.chunk(len(names))]


def sampler(function: Callable[..., Any], **extra_options: Any) -> Any:
    """A KSAMPLER."""
    return types.SimpleNamespace(sampler_function=function, extra_options=extra_options)


def sample_euler(model, x, sigmas):
    for sigma, sigma_next in pairwise(sigmas):
        denoised = model(x, sigma * x.new_ones(len(x)))
        x = x + (x - denoised) / sigma * (sigma_next - sigma)
    return x


def dpm_adaptive_function(model, x, sigmas):
    raise AssertionError("refused before it is called")
