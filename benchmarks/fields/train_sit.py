"""Train the shipped SiT on Fashion-MNIST by flow matching on the linear path (Lipman et al. 2023; Ma et al. 2024).

    python -m benchmarks.fields.train_sit --minutes 90

The budget is wall time: the learning rate is warmed up over 300 steps and falls as a cosine of the time spent, so that
any machine ends with a finished model. Writes the EMA weights as sit.safetensors and the losses as sit.csv; a run
that was interrupted resumes from sit.resume.pt. A GPU is used where there is one.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.fields.data import FOLDER, fashion_mnist
from benchmarks.fields.sit import SiT

HERE = Path(__file__).parent


def flow_matching_loss(model: SiT, x1: Tensor, y: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Mean squared error of the velocity at x_t = t x_1 + (1 - t) x_0; x1, x0 (B, C, H, W), t (B,), y (B,)."""
    time = t.reshape(-1, 1, 1, 1)
    return F.mse_loss(model(time * x1 + (1 - time) * x0, t, y), x1 - x0)


def train(
    minutes: float, folder: Path, out: Path, batch: int = 128, rate: float = 1e-3, dropout: float = 0.1, seed: int = 0
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, classes = (part.to(device) for part in fashion_mnist("train", folder))
    held_out = [part[:1000].to(device) for part in fashion_mnist("t10k", folder)]
    fixed = torch.Generator(device).manual_seed(12345)  # the validation noise and times, the same at every look
    held_out += [
        torch.randn(held_out[0].shape, generator=fixed, device=device),
        torch.rand(1000, generator=fixed, device=device),
    ]

    torch.manual_seed(seed)
    model = SiT().to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    step, spent, resume = 0, 0.0, out / "sit.resume.pt"
    if resume.exists():
        state = torch.load(resume, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]

    start = time.monotonic() - spent
    while spent < minutes * 60:
        rows = torch.randint(len(images), (batch,), device=device)
        x1, x0, t = images[rows], torch.randn(batch, *images.shape[1:], device=device), torch.rand(batch, device=device)
        y = torch.where(torch.rand(batch, device=device) < dropout, model.num_classes, classes[rows])
        loss = flow_matching_loss(model, x1, y, x0, t)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warmup, cosine = min(1.0, (step + 1) / 300), 0.5 + 0.5 * math.cos(math.pi * min(1.0, spent / (minutes * 60)))
        for group in optimizer.param_groups:
            group["lr"] = rate * warmup * cosine
        optimizer.step()
        step, spent = step + 1, time.monotonic() - start
        decay = min(0.999, (1 + step) / (10 + step))
        for slow, fast in zip(ema.parameters(), model.parameters(), strict=True):
            slow.lerp_(fast.detach(), 1 - decay)

        if step % 250 == 0 or spent >= minutes * 60:
            with torch.no_grad():
                validation = flow_matching_loss(ema, held_out[0], held_out[1], *held_out[2:]).item()
            row = dict(
                step=step, minutes=round(spent / 60, 2), loss=round(loss.item(), 5), held_out=round(validation, 5)
            )
            write_header = not (out / "sit.csv").exists()
            with (out / "sit.csv").open("a", newline="") as file:
                table = csv.DictWriter(file, list(row))
                if write_header:
                    table.writeheader()
                table.writerow(row)
            print(row, flush=True)
            states = dict(model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict())
            torch.save(dict(**states, step=step, spent=spent), resume)
            ema.save(out / "sit.safetensors", data="Fashion-MNIST, MIT licence", path="linear, data at t = 1")
    resume.unlink()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=90, help="wall time to spend (default 90, for two cores)")
    parser.add_argument("--data", type=Path, default=FOLDER, help="the folder of Fashion-MNIST's idx files")
    parser.add_argument("--out", type=Path, default=HERE, help="where the checkpoint and the log are written")
    options = parser.parse_args()
    train(options.minutes, options.data, options.out)
