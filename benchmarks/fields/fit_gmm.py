"""Fit the shipped mixture to Fashion-MNIST at 16x16: k-means inside each class, then probabilistic PCA in each cluster.

    python -m benchmarks.fields.fit_gmm

PPCA in its closed form (Tipping & Bishop 1999, Eqs. 7-8): the leading eigenvectors of the cluster's covariance, and the
mean of its other eigenvalues as the residual variance. Writes gmm.safetensors.
Shapes: N images of d = 16 x 16 pixels, K clusters, R eigenvectors.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.fields.data import CLASSES, FOLDER, fashion_mnist
from benchmarks.fields.gmm import GaussianMixture

HERE = Path(__file__).parent


def k_means(x: Tensor, clusters: int, generator: torch.Generator, most_rounds: int = 1000) -> Tensor:
    """Lloyd's algorithm from random images of x (N, d): the cluster of each, (N,)."""
    nearest = torch.cdist(x, x[torch.randperm(len(x), generator=generator)[:clusters]]).argmin(1)
    for _ in range(most_rounds):
        centres = torch.stack([x[nearest == k].mean(0) for k in range(clusters)])
        before, nearest = nearest, torch.cdist(x, centres).argmin(1)
        if torch.equal(before, nearest):
            break
    return nearest


def ppca(x: Tensor, rank: int, floor: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of x (N, d): the mean (d,), basis (d, R), variances above the residual (R,) and residual variance ()."""
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))  # ascending
    residual = values[:-rank].mean().clamp(min=floor)
    basis = vectors[:, -rank:].flip(1)
    basis = torch.where(basis.abs() > 1e-6, basis, 0)  # rounding, at pixels that are black in the whole cluster
    return x.mean(0), basis, (values[-rank:].flip(0) - residual).clamp(min=0), residual


def fit(x: Tensor, y: Tensor, clusters: int = 5, rank: int = 8, floor: float = 1e-3, seed: int = 0) -> GaussianMixture:
    """The mixture of images x (N, d) with classes y (N,): `clusters` components a class."""
    generator, groups = torch.Generator().manual_seed(seed), []
    for label in range(len(CLASSES)):
        images = x[y == label]
        nearest = k_means(images, clusters, generator)
        groups += [images[nearest == k] for k in range(clusters)]
    weight = torch.tensor([len(group) / len(x) for group in groups]).to(x)
    parts = zip(*(ppca(group, rank, floor) for group in groups), strict=True)
    mean, basis, variance, residual = (torch.stack(part) for part in parts)
    return GaussianMixture(weight, mean, basis, variance, residual)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=FOLDER, help="the folder of Fashion-MNIST's idx files")
    parser.add_argument("--out", type=Path, default=HERE / "gmm.safetensors", help="the file to write")
    options = parser.parse_args()
    images, classes = fashion_mnist("train", options.data)
    mixture = fit(F.avg_pool2d(images.double(), 2).flatten(1), classes)
    mixture.save(options.out, data="Fashion-MNIST, MIT licence, average-pooled to 16x16 in [-1, 1]")
    for name in ("weight", "variance", "residual"):
        value = getattr(mixture, name)
        print(f"{name:9} {value.min():.4g} to {value.max():.4g}")
