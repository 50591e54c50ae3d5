"""CogVideoX (Yang et al. 2024, arXiv 2408.06072) as a velocity field.

Time is (n + 1) / T in [0, 1] for the timestep n of T, data at 0: `grids.uniform(50)` are the fifty timesteps of the
pipelines ("trailing" spacing), and ``(scheduler.timesteps + 1) / T`` followed by 0 are any others. The transformer is
handed n in float32, an integer where t is one of the T times. Shapes: x (B, F, C, H, W); prompts (B, L, D).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sencache.adapters.guided import Conditioning, Guided
from sencache.fingerprint import fingerprint
from solvers import Tabulated


class CogVideoXField(Guided):
    """v(x, t) of diffusers' `CogVideoXTransformer3DModel` for the prompts' embeddings, in the model's dtype.

    alphas_cumprod: (T,) the scheduler's; `path` is made of it, and `DPMSolverPP(field.path, order=1)` is its DDIM. The
        network predicts dx / d angle on that path (v-prediction), so the velocity is that times d angle / dt.
    negative: embeddings of what `guidance` leads away from. batched: see `Guided`.
    rotary: cosines and sines of the positions, of models that use them; the pipelines have a method that makes them.
    condition: (B, F, C', H, W) what image-to-video models see beside x and does not change. ofs: their "ofs" number.
    """

    PAIR = True

    def __init__(
        self,
        model: nn.Module,
        prompt: Tensor,
        alphas_cumprod: Tensor,
        *,
        negative: Tensor | None = None,
        guidance: float = 1.0,
        batched: bool = True,
        rotary: tuple[Tensor, Tensor] | None = None,
        condition: Tensor | None = None,
        ofs: float | None = None,
    ):
        none = None if negative is None else {"prompt": negative, "condition": condition}
        super().__init__(model, {"prompt": prompt, "condition": condition}, none, guidance, batched)
        self.rotary, self.ofs, self.path = rotary, ofs, Tabulated(alphas_cumprod)
        options = (self.guidance, str(self.path), condition is not None, ofs)
        self.fingerprint = fingerprint(model, "CogVideoX", *options)

    def timestep(self, t: Tensor) -> Tensor:
        """What the transformer is handed for t."""
        n = self.path.steps * t.double() - 1
        whole = n.round()
        return torch.where((n - whole).abs() < 1e-3, whole, n).clamp(min=0).float()  # t may be float32

    def call(self, model: nn.Module, x: Tensor, t: Tensor, given: Conditioning) -> Tensor:
        seen = torch.cat([x, given["condition"].to(x)], 2) if "condition" in given else x
        return model(
            hidden_states=seen,
            encoder_hidden_states=given["prompt"],
            timestep=self.timestep(t).to(x.device),
            ofs=None if self.ofs is None else x.new_full((1,), self.ofs),
            image_rotary_emb=self.rotary,
            return_dict=False,
        )[0]

    def modulation(self, block: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return kwargs["temb"]

    def velocity(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        return self.path.coefficients(t, x).determinant * output
