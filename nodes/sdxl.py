"""The second condition of SDXL: a vector of pooled text and of the sizes of the picture."""

from comfy.model_patcher import ModelPatcher
from torch import Tensor


def vector_of(model: ModelPatcher, conditioning: list, latents: Tensor) -> Tensor | None:
    """The vector of one CONDITIONING for latents `... h w`, as samplers make it, `1 c`; None but for SDXL.

    It is the class label of its U-Net (see `layout.unet_layout`).
    """
    height, width = latents.shape[-2:]
    return model.model.encode_adm(**{"width": 8 * width, "height": 8 * height, **conditioning[0][1]})
