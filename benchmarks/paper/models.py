"""How the paper's authors sample each model: sizes, guidance and options of their code (github.com/vita-epfl/SenCache).

What the paper says of SenCache's own settings is in its Section 5; where it leaves n open, Table 1 decides: 22
evaluations of CogVideoX are fewer than n = 2 can reach, 10 + 40 / 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

STEPS = 50


@dataclass(frozen=True)
class Model:
    """A model's settings; sizes in pixels."""

    dtype: str
    height: int
    width: int
    frames: int
    guidance: float
    rules: Mapping[str, tuple[float, int]]  # SenCache's epsilon after the strict start, and n, by the name of the row
    published: tuple[int, ...]  # evaluations of these rows in Table 1
    sweeps: Mapping[str, list[tuple[float, int]]] = field(default_factory=dict)  # the same of Tables 2 and 3
    negative_prompt: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # further arguments of the pipeline's call
    scheduler: Mapping[str, Any] = field(default_factory=dict)  # settings other than the checkpoint's
    prepare: Callable[[Any], None] = lambda pipe: None  # on the loaded pipeline


def exact_vae(pipe: Any) -> None:
    """Wan's VAE decodes in float32, as in the official code and in diffusers' examples: read anew, and not rounded."""
    vae = type(pipe.vae).from_pretrained(pipe.name_or_path, subfolder="vae")  # float32 unless told otherwise
    pipe.register_modules(vae=vae.eval().to(pipe.vae.device))


def tiled_vae(pipe: Any) -> None:
    """CogVideoX's VAE decodes in slices and tiles, as in the authors' code."""
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()


# What guidance leads away from in Wan's own code: `sample_neg_prompt` of wan/configs/shared_config.py (Apache 2.0).
WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"  # noqa: RUF001
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"  # noqa: RUF001
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)

COGVIDEOX: dict[str, Any] = dict(
    height=480, width=720, frames=49, guidance=6.0, rules={"sencache": (0.6, 3)}, published=(22,),
    options={"use_dynamic_cfg": True}, prepare=tiled_vae,
)  # fmt: skip

MODELS = {
    "wan": Model(
        "bf16", 480, 832, 81, 5.0, {"sencache-slow": (0.1, 2), "sencache-fast": (0.2, 3)}, (25, 21),
        sweeps={"table2": [(0.05, n) for n in (1, 3, 4, 7)], "table3": [(e, 3) for e in (0.04, 0.06, 0.07, 0.13)]},
        negative_prompt=WAN_NEGATIVE, scheduler={"flow_shift": 5.0}, prepare=exact_vae,
    ),
    "cogvideox-2b": Model("fp16", **COGVIDEOX),
    "cogvideox-5b": Model("bf16", **COGVIDEOX),
    "ltx": Model(
        "bf16", 512, 768, 161, 3.0, {"sencache": (0.5, 3)}, (27,),
        negative_prompt="worst quality, inconsistent motion, blurry, jittery, distorted",
        options={"decode_timestep": 0.03, "decode_noise_scale": 0.025},
    ),
}  # fmt: skip
