"""How far one set of images is from another, per image. Shapes: images (B, C, H, W) in [-1, 1]."""

from __future__ import annotations

import numpy as np
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from sencache import rms

RANGE = 2.0  # of the data; images are compared as the sampler left them, not clipped


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (B,) float64."""
    return 20 * torch.log10(RANGE / rms(images.double() - reference.double()))


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) with its Gaussian window, (B,) float64."""
    options = dict(data_range=RANGE, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    pairs = zip(images.double().cpu().numpy(), reference.double().cpu().numpy(), strict=True)
    return torch.from_numpy(np.array([structural_similarity(a, b, **options) for a, b in pairs]))


def relative_error(images: Tensor, truth: Tensor) -> Tensor:
    """RMS error over the truth's RMS, (B,) float64."""
    return rms(images.double() - truth.double()) / rms(truth.double())
