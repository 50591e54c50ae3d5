"""A small class-conditional SiT (Ma et al. 2024, arXiv 2401.08740): a DiT with adaLN-zero that predicts the velocity.

Called as SiT's authors call theirs, ``model(x, t, y)``: x (B, C, H, W) in [-1, 1], t (B,) with noise at 0 and data
at 1 on the linear path x_t = t x_1 + (1 - t) x_0, y (B,) class indices where `num_classes` means "no class".
Shapes: B samples, N = (H / patch)(W / patch) tokens, D features.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """One transformer block whose two branches are shifted, scaled and gated by the conditioning (adaLN-zero)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        self.modulation = nn.Sequential(nn.SiLU(), zero_linear(dim, 6 * dim))

    def attention(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, D/heads)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        h = h + gate1 * self.attention(modulate(h, shift1, scale1))
        return h + gate2 * self.mlp(modulate(h, shift2, scale2))


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """adaLN-zero: every block starts as the identity, and the model's output as zero."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift


class SiT(nn.Module):
    """The velocity of the linear path, dx/dt = E[x_1 - x_0 | x_t, y]."""

    def __init__(
        self,
        size: int = 32,
        channels: int = 1,
        patch: int = 4,
        dim: int = 192,
        depth: int = 4,
        heads: int = 4,
        num_classes: int = 10,
    ):
        super().__init__()
        self.config = dict(
            size=size, channels=channels, patch=patch, dim=dim, depth=depth, heads=heads, num_classes=num_classes
        )
        self.patch, self.num_classes = patch, num_classes
        self.embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.position = nn.Parameter(torch.randn(1, (size // patch) ** 2, dim) * 0.02)
        self.time = nn.Sequential(nn.Linear(64, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(num_classes + 1, dim)  # the last row is "no class"
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.modulation = nn.Sequential(nn.SiLU(), zero_linear(dim, 2 * dim))
        self.head = zero_linear(dim, patch * patch * channels)
        nn.init.normal_(self.label.weight, std=0.02)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        height, width = x.shape[-2] // self.patch, x.shape[-1] // self.patch
        h = self.embed(x).flatten(2).transpose(1, 2) + self.position
        c = self.time(fourier(t).to(h.dtype)) + self.label(y)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.modulation(c).unsqueeze(1).chunk(2, dim=-1)
        patches = self.head(modulate(h, shift, scale)).unflatten(-1, (-1, self.patch, self.patch))
        return patches.unflatten(1, (height, width)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    def save(self, file: str | Path, /, **facts: str) -> None:
        """Write the weights in half precision; the header holds the configuration and any `facts` worth keeping."""
        header = {"config": json.dumps(self.config), **facts}
        save_file({name: p.detach().half().contiguous() for name, p in self.state_dict().items()}, file, header)

    @classmethod
    def load(cls, path: str | Path) -> SiT:
        """Read what `save` wrote, as a float32 model in eval mode that asks for no gradients."""
        with safe_open(path, "pt") as file:
            model = cls(**json.loads(file.metadata()["config"]))
        model.load_state_dict({name: p.float() for name, p in load_file(path).items()})
        return model.eval().requires_grad_(False)


def fourier(t: Tensor, features: int = 64, highest: float = 100.0) -> Tensor:
    """Cosines and sines of t (B,) at frequencies spaced geometrically from 1 to `highest` rad per unit time."""
    rate = torch.exp(torch.linspace(0, math.log(highest), features // 2, device=t.device))
    angle = t.float().reshape(-1, 1) * rate
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
