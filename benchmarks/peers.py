"""Caching that others publish, run with their own code on our small video models, in our loop: docs/peers.md.

diffusers' hooks and cache-dit, each set up as its documentation says. What a run costs is counted in multiplications:
those inside the transformer's blocks, over those of one full evaluation. Embeddings and head are not counted, as in
our own block reuse. Whatever a run leaves on the model is taken off again.
Shapes: x (B, ...) packed as the family's model takes it, scene (B,), ts (K + 1,). A step is one evaluation of a field.
"""

from __future__ import annotations

import ast
import io
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from typing import Any, NamedTuple

import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from diffusers.utils import logging
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop

from benchmarks.fields import video
from solvers import Stepper, integrate

Setting = dict[str, Any]  # what a peer's configuration is given beyond its defaults
ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which the registry does not know


class Loop:
    """The model as a pipeline's loop calls it: every call in a cache context that knows whose call it is, and when.

    The pipelines name their contexts "cond" and "uncond" (Wan) or "cond_uncond" (LTX, CogVideoX: both in one batch).
    """

    def __init__(self, field: video.VideoField, family: str, steps: int, swapped: bool):
        self.model, self.field, self.family, self.steps, self.swapped = field.model, field, family, steps, swapped
        self.guided = len(field.sides) == 2
        together = ["cond_uncond"] if self.guided else ["cond"]
        self.names = ["cond", "uncond"] if self.guided and not field.batched else together
        self.step, self.calls, self.sigma, self.timestep = -1, 0, 1.0, 1000.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def begin(self, x: Tensor, t: Tensor) -> None:
        """A new step at t."""
        at = self.field.path.coefficients(t, x)
        self.step += 1
        self.sigma = float(at.sigma / (at.alpha + at.sigma))  # of the linear path with this signal-to-noise ratio

    def __call__(self, **given: Any) -> Any:
        name = self.names[self.calls % len(self.names)]
        self.calls += 1
        self.timestep = float(given["timestep"].flatten()[0])
        where = {"step_index": self.step, "sigma": self.sigma, "num_inference_steps": self.steps}
        if self.swapped:  # ours is [cond, uncond], theirs [uncond, cond]
            halves = ("hidden_states", "encoder_hidden_states", "timestep")
            given |= {part: _swapped(given[part]) for part in halves}
        with self.model.cache_context(name, timestep=self.timestep, **where):
            output = self.model(**given)[0]
        return (_swapped(output) if self.swapped else output,)


def _swapped(batch: Tensor) -> Tensor:
    return torch.cat(batch.chunk(2)[::-1])


class Peer(NamedTuple):
    """A way of caching that others publish.

    install: puts it on a model for one run: (model, loop, setting) -> a context.
    settings: what its documentation recommends. With a `knob`, the threshold that spends a budget, each is sparser at
        its sparsest than the one before; without one, they are all that there is to choose from.
    adaptive: it decides by what it sees, once for a whole batch: so samples are run one by one.
    fused: it needs both halves of the guidance in one batch, which Wan's pipeline does not make.
    """

    name: str
    families: tuple[str, ...]
    install: Callable[[nn.Module, Loop, Setting], AbstractContextManager[None]]
    settings: tuple[Setting, ...]
    knob: str | None = None
    adaptive: bool = False
    fused: bool = False


@torch.no_grad()
def sample(
    peer: Peer,
    setting: Setting,
    family: str,
    model: nn.Module,
    scene: Tensor,
    x: Tensor,
    ts: Tensor,
    stepper: Stepper,
    guidance: float,
) -> tuple[Tensor, float]:
    """The samples (B, ...) at ts[-1] from x at ts[0], and the mean of the evaluations that they cost."""
    if family not in peer.families:
        raise ValueError(f"{peer.name} runs on {', '.join(peer.families)}, not on {family}; docs/peers.md says why.")
    count = 1 if peer.adaptive else len(x)
    runs = [
        _run(peer, setting, family, model, *part, ts, stepper, guidance)
        for part in zip(scene.split(count), x.split(count), strict=True)
    ]
    return torch.cat([end for end, _ in runs]), sum(spent for _, spent in runs) / len(runs)


def _run(
    peer: Peer,
    setting: Setting,
    family: str,
    model: nn.Module,
    scene: Tensor,
    x: Tensor,
    ts: Tensor,
    stepper: Stepper,
    guidance: float,
) -> tuple[Tensor, float]:
    field = video.field(family, model, scene, guidance)
    field.batched = peer.fused or family != "wan"
    with Multiplications() as whole:
        field(x, ts[0])
    stack = field.stack(x, ts[0])
    with Multiplications() as outside:
        field.head(x, ts[0], stack)
    loop, spent = Loop(field, family, len(ts) - 1, peer.fused and guidance != 1), 0.0

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        nonlocal spent
        loop.begin(x, t)
        with Multiplications() as now:
            v = field(x, t)
        spent += max(0, now.total - outside.total) / (whole.total - outside.total)
        return v

    with as_it_was(model), peer.install(model, loop, setting):
        field.model = loop
        return integrate(velocity, x, ts, stepper), spent


@torch.no_grad()
def setting_for(
    peer: Peer,
    family: str,
    model: nn.Module,
    scene: Tensor,
    x: Tensor,
    ts: Tensor,
    stepper: Stepper,
    guidance: float,
    nfe: float,
    rounds: int = 9,
) -> Setting | None:
    """The setting under which these samples cost nearest to, and at most half above, `nfe` evaluations on average.

    None where the peer cannot be had for so few. Give it samples of the choosing seeds.
    """
    given = family, model, scene, x, ts, stepper, guidance
    found = mag_ratios(peer, *given) if peer.name == "MagCache" else {}
    if peer.knob is None:
        return _listed(peer, *given, nfe)
    for setting in peer.settings:
        tried: dict[float, float] = {}

        def cost(threshold: float, setting: Setting = setting, tried: dict[float, float] = tried) -> float:
            tried[threshold] = sample(peer, {**setting, **found, peer.knob: threshold}, *given)[1]
            return tried[threshold]

        if cost(1e9) > nfe + 0.5:
            continue
        low, high = math.log(1e-5), math.log(30.0)
        for _ in range(rounds):
            middle = (low + high) / 2
            spent = cost(math.exp(middle))
            if nfe - 0.5 <= spent <= nfe + 0.5:
                break
            low, high = (middle, high) if spent > nfe else (low, middle)
        fits = {spent: threshold for threshold, spent in tried.items() if spent <= nfe + 0.5}
        best = min(fits, key=lambda spent: abs(spent - nfe))
        return {**setting, **found, peer.knob: fits[best]}
    return None


def _listed(
    peer: Peer,
    family: str,
    model: nn.Module,
    scene: Tensor,
    x: Tensor,
    ts: Tensor,
    stepper: Stepper,
    guidance: float,
    nfe: float,
) -> Setting | None:
    """The one of its settings that comes nearest; of those that cost the same, the one of the smallest error."""
    how = ts, stepper, guidance
    costs = [sample(peer, setting, family, model, scene[:1], x[:1], *how)[1] for setting in peer.settings]
    fits = [spent for spent in costs if spent <= nfe + 0.5]
    if not fits:
        return None
    best = min(fits, key=lambda spent: abs(spent - nfe))
    near = [one for one, spent in zip(peer.settings, costs, strict=True) if spent <= nfe + 0.5 and spent > best - 0.5]
    if len(near) == 1:
        return near[0]
    full = integrate(video.field(family, model, scene, guidance), x, ts, stepper)
    errors = [(sample(peer, one, family, model, scene, x, *how)[0] - full).square().mean().item() for one in near]
    return near[errors.index(min(errors))]


def mag_ratios(
    peer: Peer,
    family: str,
    model: nn.Module,
    scene: Tensor,
    x: Tensor,
    ts: Tensor,
    stepper: Stepper,
    guidance: float,
) -> Setting:
    """MagCache's ratios, from a calibration run over all samples at once, which prints them: the first list, of "cond"."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        calibrated = {"calibrate": True}
        sample(peer._replace(adaptive=False), calibrated, family, model, scene, x, ts, stepper, guidance)
    first = next(line for line in printed.getvalue().splitlines() if line.startswith("[") and line.endswith("]"))
    return {"mag_ratios": ast.literal_eval(first)}


class Multiplications(TorchDispatchMode):
    """Counts the floating-point operations of matrix products, convolutions and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet is ON_CPU:
            self.total += sdpa_flop(*(part.shape for part in args[:3]))
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **kwargs, out_val=out)
        return out


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Whatever is set on the model and its parts inside is gone afterwards."""
    before = [(part, dict(vars(part))) for part in model.modules()]
    try:
        yield
    finally:
        for part, attributes in before:
            vars(part).clear()
            vars(part).update(attributes)


@contextmanager
def hooked(model: Any, config: Any) -> Iterator[None]:
    """One of diffusers' caches, for the time inside."""
    loud = logging.get_verbosity()
    logging.set_verbosity_error()
    model.enable_cache(config)
    try:
        yield
    finally:
        model.disable_cache()
        logging.set_verbosity(loud)


def first_block(model: nn.Module, loop: Loop, setting: Setting) -> AbstractContextManager[None]:
    return hooked(model, FirstBlockCacheConfig(**setting))


def mag(model: nn.Module, loop: Loop, setting: Setting) -> AbstractContextManager[None]:
    return hooked(model, MagCacheConfig(num_inference_steps=loop.steps, **setting))


def sea(model: nn.Module, loop: Loop, setting: Setting) -> AbstractContextManager[None]:
    def latents(module: nn.Module, args: Any, given: dict[str, Any]) -> list[Tensor]:
        return list(video.unpacked(loop.family, given["hidden_states"]))  # of (C, F, H, W)

    return hooked(model, SeaCacheConfig(raw_vision_callback=latents, **setting))


def taylor(model: nn.Module, loop: Loop, setting: Setting) -> AbstractContextManager[None]:
    parts = {"wan": r"blocks\.\d+\.(attn1|attn2|ffn)"}.get(loop.family, r"transformer_blocks\.\d+\.(attn1|attn2|ff)")
    named = {} if setting.get("use_lite_mode") else {"cache_identifiers": [parts]}
    return hooked(model, TaylorSeerCacheConfig(taylor_factors_dtype=torch.float32, **named, **setting))


def pyramid(model: nn.Module, loop: Loop, setting: Setting) -> AbstractContextManager[None]:
    return hooked(model, PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: loop.timestep, **setting))


def faster(model: nn.Module, loop: Loop, setting: Setting) -> AbstractContextManager[None]:
    config = FasterCacheConfig(
        current_timestep_callback=lambda: loop.timestep,
        attention_weight_callback=lambda _: 0.3,
        tensor_format={"wan": "BCFHW", "cogvideox": "BFCHW"}[loop.family],
        is_guidance_distilled=not loop.guided,
        **setting,
    )
    return hooked(model, config)


@contextmanager
def dual_block(model: nn.Module, loop: Loop, setting: Setting) -> Iterator[None]:
    """cache-dit's DBCache on the transformer alone, with a calibrator if the setting has a `taylorseer_order`."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")
    import cache_dit

    rest = dict(setting)
    order = rest.pop("taylorseer_order", None)
    config = cache_dit.DBCacheConfig(num_inference_steps=loop.steps, enable_separate_cfg=len(loop.names) == 2, **rest)
    calibrator = order and cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)
    cache_dit.enable_cache(model, cache_config=config, calibrator_config=calibrator)
    try:
        yield
    finally:
        cache_dit.disable_cache(model)


ALL = video.FAMILIES
TAYLOR = tuple(
    {"cache_interval": interval, "disable_cache_before_step": before, "max_order": 1}
    for interval in range(1, 13)
    for before in (3, 10)
)
DUAL = tuple({"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": warmup} for warmup in (8, 4, 2, 1))
PEERS = (
    Peer("FirstBlockCache", ALL, first_block, ({},), "threshold", adaptive=True),
    Peer("MagCache", ALL, mag, tuple(
        {"max_skip_steps": skips, "retention_ratio": retained}
        for skips, retained in ((3, 0.2), (5, 0.2), (5, 0.1), (10, 0.1))
    ), "threshold", adaptive=True),
    Peer("SeaCache", ALL, sea, tuple({"max_consecutive_cached": most} for most in (2, 4, 0)), "threshold",
         adaptive=True),
    Peer("TaylorSeer", ALL, taylor, TAYLOR),
    Peer("TaylorSeer lite", ALL, taylor, tuple({**one, "use_lite_mode": True} for one in TAYLOR)),
    Peer("PAB", ALL, pyramid, tuple(
        {"spatial_attention_block_skip_range": n, "cross_attention_block_skip_range": 3 * n if n > 1 else 1}
        for n in range(1, 11)
    ), fused=True),
    Peer("FasterCache", ("wan", "cogvideox"), faster, tuple(
        {"unconditional_batch_skip_range": n, "unconditional_batch_timestep_skip_range": (-1, below)}
        for n in (1, 2, 3, 5, 8, 12, 50)
        for below in (641, 781, 901)
    ), fused=True),
    Peer("DBCache", ALL, dual_block, DUAL, "residual_diff_threshold", adaptive=True),
    Peer("DBCache + TaylorSeer", ALL, dual_block, tuple({**one, "taylorseer_order": 1} for one in DUAL),
         "residual_diff_threshold", adaptive=True),
)  # fmt: skip
