"""PSNR and SSIM against scikit-image; ST-LPIPS against a second formulation in NumPy and its authors' numbers."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from skimage.data import astronaut
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from benchmarks import metrics
from benchmarks.fields.bunny import Latents
from benchmarks.stlpips import AT_ONCE, LAYERS, STLPIPS, WEIGHTS, WHEEL, fetch, halve
from sencache import rms

Measure = Callable[[Tensor, Tensor], Tensor]


def network(channels: tuple[int, ...] = (8, 12, 10, 8, 8), dtype: torch.dtype = torch.float32) -> STLPIPS:
    """Random weights in the metric's shape, thinner."""
    generator = torch.Generator().manual_seed(0)
    shapes = list(zip(channels, (3, *channels[:-1]), (11, 5, 3, 3, 3), strict=True))
    draw = partial(torch.randn, generator=generator, dtype=dtype)
    return STLPIPS(
        kernels=tuple(draw(c, b, k, k) * (2 / (b * k * k)) ** 0.5 for c, b, k in shapes),
        biases=tuple(0.1 * draw(c) for c in channels),
        heads=tuple(draw(c).abs() / c for c in channels),
    )


MEASURES = {"psnr": metrics.psnr, "ssim": metrics.ssim, "stlpips": partial(metrics.stlpips, metric=network())}
over_measures = pytest.mark.parametrize("name", MEASURES)


def photograph(size: tuple[int, int] = (64, 64), corner: tuple[int, int] = (64, 190)) -> Tensor:
    """A crop (1, 3, H, W) in [-1, 1] of the astronaut that scikit-image ships (NASA, public domain)."""
    (y, x), (height, width) = corner, size
    crop = np.ascontiguousarray(astronaut()[y : y + height, x : x + width])
    return torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 127.5 - 1


def clip(batch: int = 3, frames: int = 4) -> Tensor:
    """(B, 3, F, 32, 64): over the photograph in steps of 3 pixels."""
    corners = [[(40 + 90 * b, 150 + 3 * f) for f in range(frames)] for b in range(batch)]
    return torch.stack([torch.stack([photograph((32, 64), at)[0] for at in row], dim=1) for row in corners])


def noisy(x: Tensor, deviation: float) -> Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    return (x + deviation * noise).clamp(-1, 1)


@over_measures
@pytest.mark.parametrize("x", [photograph(), clip()], ids=["images", "clips"])
def test_nothing_is_nearer_than_the_same_pixels(name: str, x: Tensor):
    near = MEASURES[name](x, x.clone())
    assert (near.shape, near.dtype) == (x.shape[:1], torch.float64)
    torch.testing.assert_close(near, torch.full_like(near, {"psnr": math.inf, "ssim": 1.0, "stlpips": 0.0}[name]))


@over_measures
@pytest.mark.parametrize("x", [photograph(), clip()], ids=["images", "clips"])
def test_more_noise_is_further(name: str, x: Tensor):
    near = torch.stack([MEASURES[name](noisy(x, deviation), x) for deviation in (0.02, 0.05, 0.1, 0.2, 0.4)])
    further = near.diff(dim=0) * (1 if name == "stlpips" else -1)
    assert (further > 0).all()


@over_measures
def test_a_sample_does_not_feel_its_batch(name: str):
    x = clip(batch=3, frames=AT_ONCE // 2)  # more frames than go through the network at once
    whole = MEASURES[name](noisy(x, 0.1), x)
    alone = torch.cat([MEASURES[name](noisy(x, 0.1)[b : b + 1], x[b : b + 1]) for b in range(3)])
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=0)
    assert whole.unique().numel() == 3


def test_psnr_of_a_clip_is_that_of_its_pixels():
    x = clip()
    y = noisy(x, 0.1)
    pairs = zip(x.double().numpy(), y.double().numpy(), strict=True)
    expected = [peak_signal_noise_ratio(a, b, data_range=2) for a, b in pairs]
    torch.testing.assert_close(metrics.psnr(y, x), torch.tensor(expected, dtype=torch.float64))


def test_ssim_of_a_clip_is_the_mean_over_frames_and_colours():
    x = clip()
    y = noisy(x, 0.1)
    wang = partial(structural_similarity, data_range=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    planes = zip(*(z.double().flatten(0, 2).numpy() for z in (x, y)), strict=True)  # each a picture in grey
    expected = torch.tensor([wang(a, b) for a, b in planes], dtype=torch.float64).unflatten(0, (3, 12)).mean(1)
    torch.testing.assert_close(metrics.ssim(y, x), expected, rtol=1e-9, atol=0)


def test_stlpips_of_a_clip_is_the_mean_over_frames():
    x = clip()
    y = noisy(x, 0.1)
    expected = torch.stack([network()(y[:, :, f], x[:, :, f]) for f in range(x.shape[2])]).mean(0)
    torch.testing.assert_close(MEASURES["stlpips"](y, x), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [(64, 64), (71, 66), (32, 64), (40, 24)])
def test_stlpips_is_the_network_of_the_paper(size: tuple[int, int]):
    metric = network((4, 6, 5, 4, 3), torch.float64)
    a, b = photograph(size).double(), photograph(size, (300, 100)).double()
    expected = literal(metric, a[0].numpy(), b[0].numpy())
    torch.testing.assert_close(metric(a, b).item(), expected, rtol=1e-10, atol=0)


def literal(metric: STLPIPS, a: np.ndarray, b: np.ndarray) -> float:
    """ST-LPIPS of two images (3, H, W), sum by sum."""

    def pad(x: np.ndarray, by: int, mode: str) -> np.ndarray:
        return np.pad(x, ((0, 0), (by, by), (by, by)), mode=mode)

    def windows(x: np.ndarray, k: int) -> np.ndarray:  # (C, h, w, k, k)
        return sliding_window_view(x, (k, k), axis=(1, 2))

    def bilinear(x: np.ndarray) -> np.ndarray:
        for axis in (1, 2):
            n = x.shape[axis]
            m = round(n * max(1.0, 64 / min(a.shape[1:])))
            centres = (np.arange(m) + 0.5) * n / m - 0.5
            x = np.apply_along_axis(lambda line, at=centres: np.interp(at, np.arange(len(line)), line), axis, x)
        return x

    def blurpool(x: np.ndarray) -> np.ndarray:
        binomial = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
        return np.einsum("chwij,ij->chw", windows(pad(x, 2, "reflect"), 3), binomial)[:, ::2, ::2]

    def convolve(x: np.ndarray, layer: int) -> np.ndarray:
        kernel, bias = metric.kernels[layer].numpy(), metric.biases[layer].numpy()
        padded = pad(x, 1 if layer > 1 else 2, "constant")
        return np.einsum("chwij,dcij->dhw", windows(padded, kernel.shape[-1]), kernel) + bias[:, None, None]

    def maxpool(x: np.ndarray) -> np.ndarray:
        return windows(x, 3).max((-2, -1))

    def trunk(x: np.ndarray) -> list[np.ndarray]:
        shift, scale = np.array([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])[:, :, None, None]
        first = np.maximum(blurpool(convolve((bilinear(x) - shift) / scale, 0)), 0)
        second = np.maximum(convolve(blurpool(maxpool(first)), 1), 0)
        third = np.maximum(convolve(blurpool(maxpool(second)), 2), 0)
        fourth = np.maximum(convolve(third, 3), 0)
        return [first, second, third, fourth, np.maximum(convolve(fourth, 4), 0)]

    def unit(x: np.ndarray) -> np.ndarray:
        return x / (np.sqrt((x**2).sum(0)) + 1e-10)

    pairs = zip(metric.heads, trunk(a), trunk(b), strict=True)
    return sum(float(((unit(p) - unit(q)) ** 2 * head.numpy()[:, None, None]).sum(0).mean()) for head, p, q in pairs)


@pytest.mark.parametrize("measure", [metrics.ssim, MEASURES["stlpips"]])
def test_latents_are_not_pixels(measure: Measure):
    latents = 3 * torch.randn(2, 24, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"got clips \(2, 24, 4, 8, 16\).*Decode"):
        measure(latents, latents)
    decoded = Latents.load().decode(latents)
    assert measure(decoded, decoded).shape == (2,)
    with pytest.raises(ValueError, match=r"got reference \(2, 3, 8, 32, 64\) up to 1.1"):
        measure(decoded, 1.1 * decoded)
    with pytest.raises(ValueError, match=r"got reference \(2, 3, 7, 32, 64\)"):
        measure(decoded, decoded[:, :, 1:])


def test_weights_are_read_out_of_the_wheel(tmp_path: Path):
    metric, state, file = network(), {}, io.BytesIO()
    for layer, name in enumerate(LAYERS):
        state[f"net.{name}.weight"], state[f"net.{name}.bias"] = metric.kernels[layer], metric.biases[layer]
        state[f"lin{layer}.model.1.weight"] = metric.heads[layer][None, :, None, None]
    torch.save(state, file)
    with zipfile.ZipFile(tmp_path / WHEEL, "w") as wheel:
        wheel.writestr(WEIGHTS, file.getvalue())
    x = photograph()
    assert STLPIPS.load(tmp_path)(noisy(x, 0.1), x) == metric(noisy(x, 0.1), x)


def test_without_a_network_the_way_to_the_weights_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match=r"No matching distribution(.|\n)*pip download stlpips_pytorch==0.0.2"):
        fetch(tmp_path)


def pairs() -> dict[str, tuple[Tensor, Tensor]]:
    x, large, small = photograph(), photograph((96, 128)), photograph((32, 64))
    return {
        "one pixel on": (photograph(corner=(64, 191)), x),
        "another place": (photograph(corner=(300, 100)), x),
        "darker": (0.5 * x - 0.5, x),
        "coarser, 96 x 128": (F.interpolate(F.avg_pool2d(large, 4), scale_factor=4.0), large),
        "upside down, 32 x 64": (small.flip(2), small),
    }


# Of pairs(), by the authors' own code: pip install --no-deps stlpips_pytorch==0.0.2, with stand-ins for what it imports
# and this network does not use (torchvision, torchsummary, IPython); stlpips.LPIPS(net="alex",
# variant="shift_tolerant")(x, y), the small pair brought to 64 x 128 by F.interpolate(mode="bilinear"). Torch 2.13.
AUTHORS = {
    "one pixel on": 0.00608938653,
    "another place": 0.553959489,
    "darker": 0.197431058,
    "coarser, 96 x 128": 0.160397276,
    "upside down, 32 x 64": 0.535113513,
}


@pytest.mark.slow  # the weights come with 64 MB, through pip
def test_stlpips_is_its_authors():
    measured = {name: metrics.stlpips(x, y).item() for name, (x, y) in pairs().items()}
    assert measured == pytest.approx(AUTHORS, rel=1e-5)


@pytest.mark.slow
def test_the_low_pass_filter_is_its_authors():
    with zipfile.ZipFile(fetch()) as wheel:
        state = torch.load(io.BytesIO(wheel.read(WEIGHTS)), map_location="cpu", weights_only=True)
    filters = [tensor for name, tensor in state.items() if name.endswith("filt")]
    x = torch.randn(1, 64, 9, 12, generator=torch.Generator().manual_seed(0))
    for theirs in filters:
        c = len(theirs)
        wide = x.repeat(1, 3, 1, 1)[:, :c]
        expected = F.conv2d(F.pad(wide, (2, 2, 2, 2), mode="reflect"), theirs, stride=2, groups=c)
        torch.testing.assert_close(halve(wide), expected)
    assert len(filters) == 3


@pytest.mark.slow
@pytest.mark.parametrize("corner", [(64, 190), (300, 100), (40, 150), (200, 300)])
def test_a_pixel_of_shift_costs_a_tenth_of_noise_of_its_squared_error(corner: tuple[int, int]):
    x, shifted = photograph(corner=corner), photograph(corner=(corner[0], corner[1] + 1))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    noise *= rms(shifted - x) / rms(noise)
    torch.testing.assert_close(metrics.psnr(x + noise, x), metrics.psnr(shifted, x), rtol=1e-5, atol=0)
    assert metrics.stlpips(shifted, x) < 0.1 * metrics.stlpips(x + noise, x)
