"""A node that takes a MODEL and returns it patched: its diffusion model answers from memory while it samples.

Two of ComfyUI's wrappers do it: OUTER_SAMPLE, around a whole sampling, opens and closes a scope; DIFFUSION_MODEL,
around every call of the network, answers. The batch of a call is made of conditionings, and may be put together
differently at every step: each part is remembered by its conditioning's uuid. What is cached is the velocity on the
linear path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sencache.plugins.gaussian import Carrier, Translated, time_of
from sencache.plugins.host import ADAPTIVE, calling
from sencache.plugins.kdiffusion import METHODS
from sencache.profile import SensitivityProfile
from sencache.report import Report

KEY = "sencache"
REFUSED = {"dpm_adaptive_function": ADAPTIVE}
FOLLOWED = {"sample_euler": "euler", "sample_heun": "heun", "sample_dpmpp_2m": "dpmpp_2m"}
PREDICTIONS = {  # by the classes that scale a model's input and read its output
    ("CONST", "CONST"): "velocity",
    ("EPS", "EPS"): "noise",
    ("EPS", "V_PREDICTION"): "v",
    ("EPS", "X0"): "data",
}


class SenCache:
    """The node: a MODEL, and how much to pay for it."""

    CATEGORY, FUNCTION, RETURN_TYPES = "sampling", "patch", ("MODEL",)
    DESCRIPTION = "Samples with a fraction of the model's evaluations."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802, ComfyUI's name
        return {
            "required": {
                "model": ("MODEL",),
                "nfe": ("INT", {"default": 0, "min": 0, "tooltip": "Evaluations a sampling; needs a profile. 0: off."}),
                "tolerance": ("FLOAT", {"default": 0.02, "min": 0.0, "step": 0.001, "tooltip": "Where nfe is 0."}),
                "profile": ("STRING", {"default": "", "tooltip": "File that `calibrate` saved; without, no nfe."}),
            }
        }

    def patch(self, model: Any, nfe: int, tolerance: float, profile: str) -> tuple[Any]:
        """A clone of the MODEL with both wrappers; the MODEL itself stays as it is."""
        from comfy.patcher_extension import WrappersMP  # type: ignore[import-not-found, unused-ignore]

        measured = SensitivityProfile.load(profile) if profile else None
        if nfe and measured is None:
            raise ValueError("`nfe` needs a profile: give the file that `calibrate` saved, or nfe 0 and a tolerance.")
        patched, cache = model.clone(), Cache(measured, nfe, tolerance)
        for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, cache.sample), (WrappersMP.DIFFUSION_MODEL, cache.predict)):
            patched.remove_wrappers_with_key(kind, KEY)
            patched.add_wrapper_with_key(kind, KEY, wrapper)
        return (patched,)


class Cache:
    """What the two wrappers share: the samplings under way, the innermost last."""

    def __init__(self, profile: SensitivityProfile | None, nfe: int, tolerance: float):
        self.profile, self.nfe, self.tolerance = profile, nfe, tolerance
        self.scopes: list[tuple[Translated, str, int]] = []
        self.report = Report()  # of the sampling that began last

    def sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """OUTER_SAMPLE: (noise, latent_image, sampler, sigmas, ...)."""
        noise, sampler, sigmas = args[0], args[2], args[3]
        with self._scope(noise, sampler, sigmas, executor.class_obj.model_patcher.model.model_sampling):
            return executor(*args, **kwargs)

    @contextmanager
    def _scope(self, noise: Tensor, sampler: Any, sigmas: Tensor, sampling: Any) -> Iterator[None]:
        prediction = predicts(sampling)
        alpha, sigma = shares(sigmas, prediction)
        method = getattr(getattr(sampler, "sampler_function", None), "__name__", None)
        if method not in REFUSED:
            churned = getattr(sampler, "extra_options", {}).get("s_churn")
            method = None if churned else FOLLOWED.get(str(method))
        options: dict[str, Any] = dict(key=lambda args, kwargs: args)
        options |= dict(nfe=min(self.nfe, len(sigmas) - 1)) if self.nfe else dict(tolerance=self.tolerance)
        with calling(None, self.profile, time_of(alpha, sigma), method, METHODS, REFUSED, **options) as calls:
            self.report = calls.report
            self.scopes.append((Translated(calls), prediction, noise.shape[1]))
            try:
                yield
            finally:
                self.scopes.pop()[0].close()

    def predict(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """DIFFUSION_MODEL: (x, timesteps, context, ..., transformer_options, ...)."""
        options = next((part for part in (*args, *kwargs.values()) if isinstance(part, dict) and "uuids" in part), None)
        x = args[0]
        if not self.scopes or options is None or not isinstance(x, Tensor):
            return executor(*args, **kwargs)
        translated, prediction, channels = self.scopes[-1]
        parts = x[:, :channels].chunk(len(options["uuids"]))  # static channels tell nothing of the step
        said: list[Tensor] = []

        def of_part(i: int) -> Callable[[], Tensor]:
            def evaluate() -> Tensor:
                if not said:
                    said.extend(executor(*args, **kwargs).chunk(len(parts)))
                return said[i]

            return evaluate

        window = tuple(getattr(options.get("context_window"), "index_list", None) or ())
        answers = []
        for i, (part, uuid) in enumerate(zip(parts, options["uuids"], strict=True)):
            alpha, sigma = shares(options["sigmas"].reshape(-1)[: len(part)], prediction)
            carrier = Carrier(part, alpha, sigma, prediction)
            answers.append(translated.ask(carrier, of_part(i), uuid, window))
        return torch.cat(answers)


def predicts(sampling: Any) -> str:
    """What the network predicts of its input, by the classes of ComfyUI's `model_sampling`."""
    mro = type(sampling).__mro__
    owners = tuple(
        next((cls.__name__ for cls in mro if name in vars(cls)), "none")
        for name in ("calculate_input", "calculate_denoised")
    )
    unit = getattr(sampling, "sigma_data", 1.0) == 1.0 or "CONST" in owners
    if owners not in PREDICTIONS or not unit:
        known = ", ".join(dict.fromkeys(denoised for _, denoised in PREDICTIONS))
        raise ValueError(f"SenCache knows the models of {known} with sigma_data 1; this one is {owners[1]}. Bypass it.")
    return PREDICTIONS[owners]  # type: ignore[index, unused-ignore]


def shares(sigma: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """alpha, sigma (B,) of the network's own input: a flow's, or that of unit variance."""
    sigma = sigma.detach().cpu().double()
    if prediction == "velocity":
        return 1 - sigma, sigma
    scale = (sigma**2 + 1).sqrt()
    return 1 / scale, sigma / scale
