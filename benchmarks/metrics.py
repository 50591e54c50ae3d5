"""How far one set of images or clips is from another, per sample.

Shapes: images (B, C, H, W); clips (B, 3, F, H, W), decoded and clamped; pixels are in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from benchmarks.stlpips import STLPIPS
from sencache import rms

RANGE = 2.0  # of the data; images are compared as the sampler left them, not clipped


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (B,) float64; of a clip, that of all its frames together."""
    return 20 * torch.log10(RANGE / rms(images.double() - reference.double()))


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) with its Gaussian window, (B,) float64; of a clip, its frames' mean."""
    if images.ndim == 5:
        return _over_frames(ssim, images, reference)
    options = dict(data_range=RANGE, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    pairs = zip(images.double().cpu().numpy(), reference.double().cpu().numpy(), strict=True)
    return torch.from_numpy(np.array([structural_similarity(a, b, **options) for a, b in pairs]))


def stlpips(images: Tensor, reference: Tensor, metric: STLPIPS | None = None) -> Tensor:
    """Shift-tolerant perceptual distance, (B,) float64; of a clip, its frames' mean.

    metric: what measures it, on the images' device; the authors' network by default.
    """
    metric = metric or _authors().to(images.device)
    if images.ndim == 5:
        return _over_frames(metric, images, reference)
    return metric(images, reference)


def relative_error(images: Tensor, truth: Tensor) -> Tensor:
    """RMS error over the truth's RMS, (B,) float64."""
    return rms(images.double() - truth.double()) / rms(truth.double())


@cache
def _authors() -> STLPIPS:
    return STLPIPS.load()


def _over_frames(measure: Callable[[Tensor, Tensor], Tensor], clips: Tensor, reference: Tensor) -> Tensor:
    """The mean of a measure of images over each clip's frames, (B,)."""
    for name, x in (("clips", clips), ("reference", reference)):
        if x.shape != clips.shape or x.shape[1] != 3 or x.abs().max() > 1:
            raise ValueError(
                f"Expected clips and reference (B, 3, F, H, W) alike, in [-1, 1]; got {name} {tuple(x.shape)} "
                f"up to {x.abs().max():.3g}. Decode latents and clamp their pixels first."
            )
    frames = (x.transpose(1, 2).flatten(0, 1) for x in (clips, reference))
    return measure(*frames).unflatten(0, (len(clips), -1)).mean(1)
