"""ST-LPIPS, a perceptual distance that a small shift hardly moves, with AlexNet for its trunk.

A. Ghildyal and F. Liu, "Shift-tolerant Perceptual Similarity Metric", ECCV 2022: LPIPS (Zhang et al. 2018) on an
AlexNet that halves only what is low-pass filtered. The network is written here; the weights are the authors', out of
stlpips_pytorch 0.0.2 on PyPI (BSD 2-clause, (c) 2022 Abhijay Ghildyal, Feng Liu), which pip downloads (64 MB).
Shapes: images (B, 3, H, W) in [-1, 1]; features (B, C, h, w), with C of each layer its own.
"""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

CACHE = Path.home() / ".cache" / "sencache"
RELEASE, WHEEL = "stlpips_pytorch==0.0.2", "stlpips_pytorch-0.0.2-py3-none-any.whl"
WEIGHTS = "stlpips_pytorch/weights/vST0.0/alex_shift_tolerant.pth"
LAYERS = ("slice1.0", "slice2.5", "slice3.9", "slice4.11", "slice5.13")  # the convolutions' names in WEIGHTS
PADDING = (2, 2, 1, 1, 1)  # AlexNet's, with zeros
MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of the colours, as in LPIPS
SIDE = 64  # pixels; LPIPS was fitted to patches of 64 x 64, and smaller images are enlarged to it
AT_ONCE = 32  # images, whose first features are 58 MB at 64 x 128 pixels


@dataclass(frozen=True, eq=False)
class STLPIPS:
    """The metric: AlexNet's five convolutions, and how much each of their channels counts."""

    kernels: tuple[Tensor, ...]  # (C, C of the layer before, k, k)
    biases: tuple[Tensor, ...]  # (C,)
    heads: tuple[Tensor, ...]  # (C,), none negative

    def __call__(self, images: Tensor, reference: Tensor) -> Tensor:
        """How far each image is from its reference, (B,) float64."""
        pairs = zip(images.split(AT_ONCE), reference.split(AT_ONCE), strict=True)
        return torch.cat([self._distance(*pair) for pair in pairs])

    @torch.no_grad()
    def _distance(self, images: Tensor, reference: Tensor) -> Tensor:
        """Squared differences of unit features, weighted by the heads: mean over places, sum over layers.

        LPIPS, Eq. 1, where the heads are called w^2.
        """
        layers = zip(self.heads, self.features(images), self.features(reference), strict=True)
        maps = [torch.einsum("c,bchw->bhw", head, (unit(a) - unit(b)).square()) for head, a, b in layers]
        return torch.stack([layer.double().mean((1, 2)) for layer in maps]).sum(0)

    def features(self, images: Tensor) -> list[Tensor]:
        """What each layer makes of the images, after its ReLU. Every convolution has stride 1."""
        x, features = images.to(self.kernels[0]), []
        x = (enlarge(x) - x.new_tensor(MEAN)[:, None, None]) / x.new_tensor(DEVIATION)[:, None, None]
        for layer, (kernel, bias, padding) in enumerate(zip(self.kernels, self.biases, PADDING, strict=True)):
            if layer in (1, 2):
                x = halve(F.max_pool2d(x, 3, stride=1))  # for AlexNet's max-pooling of stride 2
            x = F.conv2d(x, kernel, bias, padding=padding)
            if layer == 0:
                x = halve(x)  # for AlexNet's stride of 4: by 2, and before the ReLU
            x = F.relu(x)
            features.append(x)
        return features

    def to(self, device: torch.device | str) -> STLPIPS:
        parts = (self.kernels, self.biases, self.heads)
        return STLPIPS(*(tuple(tensor.to(device) for tensor in part) for part in parts))

    @classmethod
    def load(cls, folder: str | Path = CACHE) -> STLPIPS:
        """The authors' metric, out of the wheel in `folder`, which is fetched once."""
        with zipfile.ZipFile(fetch(folder)) as wheel:
            state = torch.load(io.BytesIO(wheel.read(WEIGHTS)), map_location="cpu", weights_only=True)
        return cls(
            kernels=tuple(state[f"net.{name}.weight"] for name in LAYERS),
            biases=tuple(state[f"net.{name}.bias"] for name in LAYERS),
            heads=tuple(state[f"lin{layer}.model.1.weight"].flatten() for layer in range(len(LAYERS))),
        )


def enlarge(x: Tensor) -> Tensor:
    """x (B, C, H, W), its shorter side brought to SIDE pixels where it has fewer, in proportion."""
    height, width = x.shape[2:]
    if min(height, width) >= SIDE:
        return x
    size = [round(side * SIDE / min(height, width)) for side in (height, width)]
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def halve(x: Tensor) -> Tensor:
    """Every second pixel of x (B, C, h, w), reflected by 2 at its edges and filtered by [1, 2, 1] / 4 along each side.

    R. Zhang, "Making Convolutional Networks Shift-Invariant Again", ICML 2019, reflects by 1, which halves the size
    exactly; ST-LPIPS by one more.
    """
    taps = x.new_tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(taps, taps).repeat(x.shape[1], 1, 1, 1)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])


def unit(features: Tensor) -> Tensor:
    """Features (B, C, h, w) over their length at each place; where all are zero they stay so."""
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def fetch(folder: str | Path = CACHE) -> Path:
    """The authors' wheel in `folder`, where pip downloads it unless it is there. Raises RuntimeError if pip cannot."""
    file = Path(folder) / WHEEL
    if not file.exists():
        download = ["-m", "pip", "download", RELEASE, "--no-deps", "--dest", str(folder)]
        done = subprocess.run([sys.executable, *download, "--quiet"], capture_output=True, text=True)
        if not file.exists():
            raise RuntimeError(
                f"Expected the weights of ST-LPIPS in {file}; pip could not download them: {done.stderr.strip()}\n"
                f"Where there is a network, run python {' '.join(download)}, and put {WHEEL} into {folder}."
            )
    return file
