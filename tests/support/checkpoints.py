"""Tiny checkpoints with random weights."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tav_core.checkpoint_parts import CONFIGS


def make_folder(folder: Path, cross: int = 32, **scheduler) -> Path:
    """A tiny diffusers folder of the layout of Stable Diffusion, random weights."""
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=2,
        norm_num_groups=8,
        cross_attention_dim=cross,
        attention_head_dim=4,
        use_linear_projection=cross == 1024,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=64,
    ).save_pretrained(folder / "vae")
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408 if cross == 32 else 64,
            hidden_size=cross,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    ).save_pretrained(folder / "text_encoder")
    CLIPTokenizer.from_pretrained(CONFIGS / "tokenizer").save_pretrained(folder / "tokenizer")
    DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        set_alpha_to_one=False,
        steps_offset=1,
        **scheduler,
    ).save_pretrained(folder / "scheduler")
    return folder


def write(path: Path, tensors: dict, metadata=None) -> Path:
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, path, metadata)
    return path
