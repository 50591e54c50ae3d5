"""Fashion-MNIST (Xiao et al. 2017, MIT licence), as Debian's package `dataset-fashion-mnist` installs it."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def fashion_mnist(split: str = "train", folder: str | Path = FOLDER) -> tuple[Tensor, Tensor]:
    """The images padded to 32x32 and scaled to [-1, 1], (M, 1, 32, 32), and their classes (M,).

    `split` is "train" (60,000 images) or "t10k" (10,000). Raises FileNotFoundError with the way to get the files.
    """
    images, labels = (Path(folder) / f"{split}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    if not images.exists():
        raise FileNotFoundError(
            f"Expected Fashion-MNIST in {folder}, found no {images.name}. On Debian or Ubuntu: "
            "apt-get install dataset-fashion-mnist; elsewhere pass the folder that holds its four idx files."
        )
    pixels = np.frombuffer(gzip.decompress(images.read_bytes()), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    classes = np.frombuffer(gzip.decompress(labels.read_bytes()), np.uint8, offset=8)
    x = torch.from_numpy(pixels.copy()).float() / 127.5 - 1
    return F.pad(x, (2, 2, 2, 2), value=-1.0), torch.from_numpy(classes.astype(np.int64))
