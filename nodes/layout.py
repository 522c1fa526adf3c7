"""How a U-Net is laid out, as diffusers' configuration says it and as a native model's does."""

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import comfy.model_base
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from ..tav_core import TavError
from .patches import layers_of


def unet_layout(model: comfy.model_base.BaseModel, unet: UNetModel) -> dict[str, Any]:
    """The diffusers configuration of the U-Net of a native model.

    SDXL's embedding of pooled text and sizes becomes diffusers' projection of class embeddings, which computes the same
    from the vector that ComfyUI makes of them.

    Raises:
        TavError: an SDXL refiner, an inpainting model and others that Tune-A-Video isn't for.
    """
    config: Mapping[str, Any] = model.model_config.unet_config
    channels, levels = unet.model_channels, len(config["channel_mult"])
    vector = config.get("adm_in_channels")
    if config.get("use_temporal_attention"):
        problem = f"is a video model already ({type(model).__name__})"
        raise TavError("MODEL", None, problem, "give a text-to-image SD 1.x, 2.x or SDXL checkpoint")
    if vector is not None and not isinstance(model, comfy.model_base.SDXL):
        problem = f"is an SDXL refiner, unCLIP or the like ({type(model).__name__})"
        raise TavError("MODEL", None, problem, "give SD 1.x, 2.x or the SDXL base")
    if unet.in_channels != 4:
        kind = {9: "an inpainting model", 8: "an image-editing model", 5: "a depth model"}.get(
            unet.in_channels, "unusual"
        )
        problem = f"is {kind} ({unet.in_channels} input channels)"
        raise TavError("MODEL", None, problem, "give a text-to-image SD 1.x, 2.x or SDXL checkpoint")
    blocks = (
        [config["num_res_blocks"]] * levels if isinstance(config["num_res_blocks"], int) else config["num_res_blocks"]
    )
    ends = list(accumulate(blocks))
    depths = [config["transformer_depth"][end - 1] for end in ends]
    middle = config["transformer_depth_middle"]
    down, up = ([depth for depth, count in zip(depths, blocks) for _ in range(count + more)] for more in (0, 1))
    regular = [list(config["transformer_depth"]), list(config["transformer_depth_output"])] == [down, up]
    if not regular or depths[-1] not in (0, middle):
        raise TavError(
            "MODEL", None, "is a distilled SDXL (its transformers differ within a level)", "give the SDXL base"
        )
    widths = [channels * multiple for multiple in config["channel_mult"]]
    heads = config.get("num_heads", -1)
    if heads == -1:
        heads = [width // config["num_head_channels"] for width in widths]
    return dict(
        in_channels=4, out_channels=4, block_out_channels=widths, layers_per_block=list(blocks), norm_num_groups=32,
        down_block_types=["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        up_block_types=["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        transformer_layers_per_block=[max(depth, 1) for depth in depths[:-1]] + [middle],
        cross_attention_dim=config["context_dim"], attention_head_dim=heads,
        class_embed_type=None if vector is None else "projection", projection_class_embeddings_input_dim=vector,
        use_linear_projection=bool(config.get("use_linear_in_transformer")),
        upcast_attention=config.get("attn_precision") == torch.float32,
    )  # fmt: skip


def core_layout(unet: UNet2DConditionModel) -> dict[str, Any]:
    """What the unet_config of a native model says of such a U-Net, for the nodes that ask it (FreeU, for one).

    All but `num_res_blocks`: where it stands, the core takes the weights to have the names of the original code.
    """

    def depth(*modules: nn.Module) -> int:
        return sum(isinstance(part, BasicTransformerBlock) for module in modules for part in module.modules())

    config, channels = unet.config, unet.config.block_out_channels[0]
    attentions = [block.attn1 for block in unet.modules() if isinstance(block, BasicTransformerBlock)]
    heads, sizes = {attn.heads for attn in attentions}, {attn.inner_dim // attn.heads for attn in attentions}
    return dict(
        in_channels=config.in_channels, out_channels=config.out_channels, model_channels=channels,
        channel_mult=[width // channels for width in config.block_out_channels], context_dim=config.cross_attention_dim,
        transformer_depth=[depth(*layers) for block in unet.down_blocks for layers in layers_of(block)],
        transformer_depth_middle=depth(unet.mid_block),
        # taken from its end
        transformer_depth_output=[depth(*layers) for block in unet.up_blocks for layers in layers_of(block)][::-1],
        num_heads=heads.pop() if len(heads) == 1 else -1, num_head_channels=sizes.pop() if len(sizes) == 1 else -1,
        use_spatial_transformer=True, use_linear_in_transformer=bool(config.use_linear_projection), legacy=False,
        use_temporal_attention=False, adm_in_channels=None,
        attn_precision=torch.float32 if config.upcast_attention else None,
    )  # fmt: skip
