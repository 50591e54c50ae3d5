"""Clips of Big Buck Bunny, and the fixed latents in which video models are trained on them.

    python -m benchmarks.fields.bunny

takes the film ((c) 2008 Blender Foundation, www.bigbuckbunny.org, CC-BY 3.0) from the source distribution of moviepy
2.2.1, where it lies as an example, and writes its frames as bunny.npy, which stays out of the repository, and the basis
of the latents as bunny.safetensors. A scene is what lies between two cuts, and its number is what a model is
conditioned on; scenes shorter than a clip and the credits are left out.

Latents: blocks of 2 frames x 4 x 4 pixels x 3 colours, projected on their leading principal directions, each divided
by the square root of its deviation: between pixels, where the first direction is all there is, and whitened ones.
Shapes: clips (B, 3, 8, 32, 64) in [-1, 1]; latents (B, 24, 4, 8, 16) of unit variance.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent
SOURCE = "Big Buck Bunny, (c) 2008 Blender Foundation, CC-BY 3.0"
FRAMES, HEIGHT, WIDTH = 8, 32, 64  # of a clip, a second at 8 frames a second
BLOCK, CHANNELS = (2, 4, 4), 24  # of the latents
CUT = 25.0  # mean absolute difference of two frames, of 255, that ends a scene
CREDITS = 400  # frames; no scene is as long as the credits


def film(folder: str | Path = HERE) -> Tensor:
    """The frames (M, 3, 32, 64) in [-1, 1], at 8 a second. Raises FileNotFoundError with the way to get them."""
    file = Path(folder) / "bunny.npy"
    if not file.exists():
        raise FileNotFoundError(f"Expected the film's frames at {file}: run python -m benchmarks.fields.bunny.")
    return torch.from_numpy(np.load(file)).permute(0, 3, 1, 2).float() / 127.5 - 1


def scenes(frames: Tensor) -> list[tuple[int, int]]:
    """First and last frame (exclusive) of each scene."""
    difference = 127.5 * (frames[1:] - frames[:-1]).abs().mean((1, 2, 3))
    cuts = [0, *(1 + torch.nonzero(difference > CUT).flatten()).tolist(), len(frames)]
    return [(a, b) for a, b in pairwise(cuts) if FRAMES <= b - a < CREDITS]


def clips(frames: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clips (M, ...) and their scenes (M,) to train on, and those held out: the last clip of every scene of three."""
    train, held = [], []
    for scene, (a, b) in enumerate(scenes(frames)):
        last = b - FRAMES if b - a >= 3 * FRAMES else b
        train += [(scene, start) for start in range(a, min(last - FRAMES, b - FRAMES) + 1)]
        held += [(scene, last)] if last < b else []
    return tuple(  # type: ignore[return-value]
        part
        for pairs in (train, held)
        for part in (
            torch.stack([frames[start : start + FRAMES].transpose(0, 1) for _, start in pairs]),
            torch.tensor([scene for scene, _ in pairs]),
        )
    )


@dataclass(frozen=True, eq=False)
class Latents:
    """The fixed, linear latent space."""

    mean: Tensor  # (96,)
    basis: Tensor  # (96, 24), orthonormal
    scale: Tensor  # (24,)

    def encode(self, clip: Tensor) -> Tensor:
        """Latents (B, 24, 4, 8, 16) of clips (B, 3, 8, 32, 64)."""
        return (((_blocks(clip) - self.mean) @ self.basis) / self.scale).movedim(-1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Clips (B, 3, 8, 32, 64), clamped to [-1, 1], of latents (B, 24, 4, 8, 16)."""
        flat = (latents.movedim(1, -1) * self.scale) @ self.basis.T + self.mean
        blocks = flat.unflatten(-1, (3, *BLOCK))  # (B, F, H, W, 3, f, h, w)
        whole = blocks.permute(0, 4, 1, 5, 2, 6, 3, 7)
        return whole.flatten(6, 7).flatten(4, 5).flatten(2, 3).clamp(-1, 1)

    def to(self, device: torch.device | str) -> Latents:
        return Latents(self.mean.to(device), self.basis.to(device), self.scale.to(device))

    @classmethod
    def fit(cls, clip: Tensor) -> Latents:
        """The principal directions of the blocks of clips (B, 3, 8, 32, 64)."""
        blocks = _blocks(clip).flatten(0, -2).double()
        values, vectors = torch.linalg.eigh(torch.cov(blocks.T))  # ascending
        deviation = values[-CHANNELS:].flip(0).sqrt()
        scale = deviation.sqrt() * deviation.mean().sqrt()  # mean variance (deviation / mean deviation) is one
        parts = (blocks.mean(0), vectors[:, -CHANNELS:].flip(1), scale)
        return cls(*(part.float().contiguous() for part in parts))

    def save(self, file: Path) -> None:
        save_file({"mean": self.mean, "basis": self.basis, "scale": self.scale}, file, {"data": SOURCE})

    @classmethod
    def load(cls, file: Path = HERE / "bunny.safetensors") -> Latents:
        return cls(**load_file(file))


def _blocks(clip: Tensor) -> Tensor:
    """Clips (B, 3, 8, 32, 64) as blocks (B, 4, 8, 16, 96)."""
    f, h, w = BLOCK
    parts = clip.unfold(2, f, f).unfold(3, h, h).unfold(4, w, w)  # (B, 3, F, H, W, f, h, w)
    return parts.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4)


def fetch(folder: Path) -> bytes:
    """The film as its mp4, 1280 x 720, out of moviepy's source distribution, which pip downloads into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "moviepy==2.2.1", "--no-binary", ":all:", "--no-deps"]
    subprocess.run([*command, "--quiet", "--dest", str(folder)], check=True)
    with tarfile.open(folder / "moviepy-2.2.1.tar.gz") as source:
        member = next(name for name in source.getnames() if name.endswith("moviepy_10_minutes.zip"))
        archive = source.extractfile(member)
        assert archive is not None
        with zipfile.ZipFile(io.BytesIO(archive.read())) as example:
            return example.read("moviepy_10_minutes/resources/bbb.mp4")


def frames_of(film: bytes) -> np.ndarray:
    """Every third frame (M, 32, 64, 3) uint8 of the film, area-averaged to 64 x 36 and cropped to its middle rows."""
    import av

    with av.open(io.BytesIO(film)) as container:
        container.streams.video[0].thread_type = "AUTO"
        small = [
            frame.reformat(WIDTH, 36, "rgb24", interpolation="AREA").to_ndarray()[2:34]
            for number, frame in enumerate(container.decode(video=0))
            if number % 3 == 0
        ]
    return np.stack(small)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        np.save(HERE / "bunny.npy", frames_of(fetch(Path(folder))))
    train, scene, held, _ = clips(film())
    latents = Latents.fit(train)
    latents.save(HERE / "bunny.safetensors")
    error = (latents.decode(latents.encode(held)) - held).square().mean()
    count = f"{len(train)} clips of {1 + int(scene.max())} scenes, {len(held)} held out"
    print(f"{count}; latents keep {10 * torch.log10(4 / error):.1f} dB")
