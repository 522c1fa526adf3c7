"""Trains the ControlNet of the mini checkpoint: its hint is the subject's silhouette, white on black.

    python -m tav_core.mini train controlnet --work DIR     # 40 minutes on one CPU core

The U-Net is frozen. A caption is left out more often than for the U-Net, so that the silhouette is obeyed without a
word on it (Zhang et al. 2023, arXiv 2302.05543).
"""

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import nn

from ..checkpoint import encode_prompt, load_checkpoint
from . import world
from .evaluate import silhouettes
from .train import autocast, encode_all, fit, load_average, noisy_batch, render_all, training_caption, training_scenes

NO_CAPTION = 0.3  # share of the captions that are left out


def make_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """A copy of the U-Net's encoder; half of its middle block is enough, and keeps it small.

    The layers of the hint start as He et al. 2015 (arXiv 1502.01852) have it: with PyTorch's own, or a zero at their
    end, the hint hardly reaches the output at first. The zeros of the last layers alone keep the U-Net undisturbed at
    the start.
    """
    embedding = dict(conditioning_embedding_out_channels=(8, 16, 32, 64))
    whole = ControlNetModel.from_unet(unet, **embedding)
    controlnet = ControlNetModel.from_config({**whole.config, "mid_block_type": "UNetMidBlock2D"})
    controlnet.load_state_dict({n: p for n, p in whole.state_dict().items() if n in controlnet.state_dict()})
    for layer in controlnet.controlnet_cond_embedding.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return controlnet


def train_controlnet(
    work: Path, checkpoint_folder: Path, device: torch.device, renders: int, steps: int, batch: int, lr: float
):
    """Noise prediction of the frozen U-Net, given the silhouette."""
    torch.manual_seed(4)
    scenes = training_scenes(renders)
    checkpoint = load_checkpoint(checkpoint_folder, device=device)
    mean, std = encode_all(checkpoint.vae, render_all(scenes, work / "renders.npy"), work / "moments.npy", device)
    scale, unet = checkpoint.vae.config.scaling_factor, checkpoint.unet
    controlnet = make_controlnet(unet).to(device).train()

    def loss_of_step(step: int) -> torch.Tensor:
        words = random.Random(step)
        chosen, noisy, t, noise, weight = noisy_batch(mean, std, scale, batch, np.random.default_rng((4, step)), device)
        captions = ["" if words.random() < NO_CAPTION else training_caption(scenes[i], words) for i in chosen]
        hints = silhouettes(np.stack([world.subject_mask(scenes[i]) for i in chosen])).to(device)
        with autocast(device):
            text = encode_prompt(checkpoint, captions)
            down, mid = controlnet(noisy, t, text, hints, return_dict=False)
            predicted = unet(
                noisy, t, text, down_block_additional_residuals=down, mid_block_additional_residual=mid
            ).sample
        return (weight * (predicted.float() - noise).square()).mean()

    fit(controlnet, loss_of_step, work / "controlnet.safetensors", steps=steps, lr=lr, ema=0.998)


def export_controlnet(work: Path, output: Path):
    """Writes `controlnet/`, a diffusers folder in fp16."""
    controlnet = make_controlnet(load_checkpoint(output / "checkpoint").unet)
    load_average(controlnet, work / "controlnet.safetensors").half().save_pretrained(output / "controlnet")
