"""Tiny U-Nets of diffusers with random weights, and what goes in."""

import torch
from diffusers import UNet2DConditionModel

CROSS_DOWN, DOWN, CROSS_UP, UP = "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"
TINY = dict(
    sample_size=8,
    block_out_channels=(16, 32),
    layers_per_block=1,
    down_block_types=(CROSS_DOWN, DOWN),
    up_block_types=(UP, CROSS_UP),
    cross_attention_dim=24,
    attention_head_dim=4,
    norm_num_groups=4,
)


def make_unet(**changes):
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**TINY, **changes}).eval()


def stir(unet):
    """Give the temporal output projections, zero at the start, weight."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in unet.named_parameters():
        if "attn_temp.to_out" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    return unet


def inputs(b=1, f=3, tokens=5, size=8):
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(b, 4, f, size, size, generator=generator),
        torch.arange(b) * 300 + 100,
        torch.randn(b, tokens, 24, generator=generator),
    )


def difference(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()
