"""Train a small video model on Big Buck Bunny, by flow matching or v-prediction as its family does.

    python -m benchmarks.fields.train_video wan --minutes 60

The budget is wall time, as in train_sit: any machine ends with a finished model. Matrices of the blocks are trained
with Muon (Jordan et al. 2024), everything else with AdamW; products are taken in bfloat16. Writes the EMA weights as
wan.safetensors and the losses as wan.csv; a run that was interrupted resumes from wan.resume.pt. A GPU is used where
there is one.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.fields import video
from benchmarks.fields.bunny import HERE, SOURCE, Latents, clips, film


def loss_of(family: str, model: nn.Module, data: Tensor, scene: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Mean squared error of the velocity over the path's own speed; data, noise (B, ...) packed, scene, t (B,).

    On the linear path that speed is one; on CogVideoX's it makes the error that of the predicted v.
    """
    field = video.field(family, model, scene)
    at = field.path.coefficients(t, data)
    x = at.alpha * data + at.sigma * noise
    velocity = at.dalpha * data + at.dsigma * noise
    return ((field(x, t) - velocity) / at.determinant).square().mean()


def optimizers_of(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for what leads into them and out of them."""
    inside = {id(p) for name, p in model.named_parameters() if "blocks." in name and p.ndim == 2 and min(p.shape) > 8}
    matrices = [p for p in model.parameters() if id(p) in inside]
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """Attention in plain products: on the host the gradients of PyTorch's own take longer than all else together."""
    weights = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if attn_mask is not None:
        weights = weights + attn_mask
    return weights.softmax(-1).to(value.dtype) @ value


def train(
    family: str, minutes: float, folder: Path, batch: int = 32, rate: float = 2e-3, dropout: float = 0.1, seed: int = 0
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    latents, (data, scene, held, held_scene) = Latents.load(), clips(film())
    data, held = (video.packed(family, latents.encode(part)).to(device) for part in (data, held))
    scene, held_scene = scene.to(device), held_scene.to(device)
    fixed = torch.Generator().manual_seed(12345)  # the validation noise and times, the same at every look
    held_noise = torch.randn(held.shape, generator=fixed).to(device)
    held_t = (torch.randint(1, 1001, (len(held),), generator=fixed) / 1000).to(device)

    torch.manual_seed(seed)
    model = video.build(family).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizers = optimizers_of(model, rate)
    step, spent, resume = 0, 0.0, folder / f"{family}.resume.pt"
    if resume.exists():
        state = torch.load(resume, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, spent = state["step"], state["spent"]
    model.compile()

    start, saved_at = time.monotonic() - spent, spent
    while spent < minutes * 60:
        rows = torch.randint(len(data), (batch,), device=device)
        noise, t = torch.randn_like(data[rows]), torch.randint(1, 1001, (batch,), device=device) / 1000
        given = torch.where(torch.rand(batch, device=device) < dropout, -1, scene[rows])
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(family, model, data[rows], given, noise, t)
        warmup, cosine = min(1.0, (step + 1) / 100), 0.5 + 0.5 * math.cos(math.pi * min(1.0, spent / (minutes * 60)))
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate * warmup * cosine
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step, spent = step + 1, time.monotonic() - start
        decay = min(0.998, (1 + step) / (10 + step))
        for slow, fast in zip(ema.parameters(), model.parameters(), strict=True):
            slow.lerp_(fast.detach(), 1 - decay)

        if step == 1 or spent - saved_at > 120 or spent >= minutes * 60:
            saved_at = spent
            with torch.no_grad():
                validation = loss_of(family, ema, held, held_scene, held_noise, held_t).item()
            row = dict(
                step=step, minutes=round(spent / 60, 2), loss=round(loss.item(), 5), held_out=round(validation, 5)
            )
            log, write_header = folder / f"{family}.csv", not (folder / f"{family}.csv").exists()
            with log.open("a", newline="") as file:
                table = csv.DictWriter(file, list(row))
                if write_header:
                    table.writeheader()
                table.writerow(row)
            print(row, flush=True)
            states = dict(model=model.state_dict(), ema=ema.state_dict())
            torch.save(dict(**states, optimizers=[o.state_dict() for o in optimizers], step=step, spent=spent), resume)
            video.save(ema, family, folder / f"{family}.safetensors", data=SOURCE)
    resume.unlink()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=video.FAMILIES)
    parser.add_argument("--minutes", type=float, default=60, help="wall time to spend (default 60, for one core)")
    parser.add_argument("--out", type=Path, default=HERE, help="where the checkpoint and the log are written")
    options = parser.parse_args()
    slow = torch.nn.functional if not torch.cuda.is_available() else None
    with patch.object(slow, "scaled_dot_product_attention", attention) if slow else nullcontext():
        train(options.family, options.minutes, options.out)
