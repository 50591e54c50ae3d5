"""LTX-Video (HaCohen et al. 2024, arXiv 2501.00103) as a velocity field.

Time is sigma in [0, 1] on the linear path, data at 0, the unit of `scheduler.sigmas`; the transformer is handed the
timestep 1000 sigma in float32. Shapes: x (B, N, C), N = num_frames height width tokens; prompts (B, L, D).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sencache.adapters.guided import Conditioning, Guided
from sencache.fingerprint import fingerprint
from solvers import Linear


class LTXField(Guided):
    """v(x, t) of diffusers' `LTXVideoTransformer3DModel` for the prompts' embeddings, in the model's dtype.

    mask: (B, L), 1 where the prompt has a token and 0 where it is padded. negative, negative_mask: of what `guidance`
        leads away from. batched: see `Guided`.
    num_frames, height, width: of the latent video. scale: seconds and pixels a latent step, frame, row and column:
        (8 / frame_rate, 32, 32) in the pipelines.
    held: (B, N) bool, tokens of x that are given and stay (image-to-video): the model sees them at timestep 0.
        Leave them out of norms with ``norm=partial(rms, mask=~held[..., None])`` where all samples hold the same.
    """

    def __init__(
        self,
        model: nn.Module,
        prompt: Tensor,
        mask: Tensor,
        *,
        num_frames: int,
        height: int,
        width: int,
        scale: tuple[float, float, float],
        negative: Tensor | None = None,
        negative_mask: Tensor | None = None,
        guidance: float = 1.0,
        batched: bool = True,
        held: Tensor | None = None,
    ):
        held = None if held is None else held.bool()
        none = None if negative is None else {"prompt": negative, "mask": negative_mask, "held": held}
        super().__init__(model, {"prompt": prompt, "mask": mask, "held": held}, none, guidance, batched)
        self.shape = {"num_frames": num_frames, "height": height, "width": width, "rope_interpolation_scale": scale}
        self.path = Linear()
        self.fingerprint = fingerprint(model, "LTX", self.guidance, *self.shape.values(), held is not None)

    def call(self, model: nn.Module, x: Tensor, t: Tensor, given: Conditioning) -> Tensor:
        timestep = (1000 * t.float()).to(x.device)
        if "held" in given:
            timestep = (timestep[:, None] if timestep.ndim == 1 else timestep) * ~given["held"]
        return model(
            hidden_states=x,
            encoder_hidden_states=given["prompt"],
            timestep=timestep,
            encoder_attention_mask=given["mask"],
            **self.shape,
            return_dict=False,
        )[0]

    def modulation(self, block: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        tokens, temb = kwargs["hidden_states"], kwargs["temb"]
        table = block.get_parameter("scale_shift_table")  # (6, D): shift and scale of the attention come first
        shift, scale = (table + temb.unflatten(-1, (len(table), -1))).unbind(2)[:2]
        return block.get_submodule("norm1")(tokens) * (1 + scale) + shift

    def velocity(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        held = self.sides[0].get("held")
        return output if held is None else output * ~held[..., None]
