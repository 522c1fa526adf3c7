"""The second condition of SDXL: a vector of pooled text and of the sizes of the picture, carried behind the text."""

import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..tav_core import VideoUNet


class VectorVideoUNet(VideoUNet):
    """A video U-Net that finds the vector behind the tokens of the text (`packed`).

    So whatever knows of text alone (tuning, inversion and sampling of `tav_core`) carries it along.
    """

    def forward(self, latents: Tensor, timesteps: Tensor | float | int, encoder_hidden_states: Tensor) -> Tensor:
        channels, width = self.config.projection_class_embeddings_input_dim, self.config.cross_attention_dim
        count = -(-channels // width)
        text, tail = encoder_hidden_states[:, :-count], encoder_hidden_states[:, -count:]
        return super().forward(latents, timesteps, text, class_labels=tail.flatten(1)[:, :channels])


def packed(text: Tensor, vector: Tensor) -> Tensor:
    """`b n d` and `b c` to `b n+m d`: the vector as m more tokens, filled up with zeros. A batch of one is for all."""
    batch = max(len(text), len(vector))
    tail = F.pad(vector.to(text), (0, -vector.shape[1] % text.shape[2])).unflatten(1, (-1, text.shape[2]))
    return torch.cat([text.expand(batch, -1, -1), tail.expand(batch, -1, -1)], dim=1)


def vector_of(model: ModelPatcher, conditioning: list, latents: Tensor) -> Tensor | None:
    """The vector of one CONDITIONING for latents `... h w`, as samplers make it, `1 c`; None but for SDXL."""
    height, width = latents.shape[-2:]
    return model.model.encode_adm(**{"width": 8 * width, "height": 8 * height, **conditioning[0][1]})
