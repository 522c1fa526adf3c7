"""Trains a LoRA for the mini checkpoint: the style "neon", which the checkpoint has never seen.

    python -m tav_core.mini train lora --work DIR     # 10 minutes on one CPU core

Low-rank changes of the U-Net's attention, feed-forward and convolution weights are learned (Hu et al. 2021, arXiv
2106.09685) from pictures in the style whose captions don't speak of it: so it needs no words, its strength is enough.
"""

import copy
import dataclasses
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..atomic import atomic_path
from ..checkpoint import Checkpoint, encode_prompt, load_checkpoint
from .train import autocast, encode_all, fit, load_average, noisy_batch, render_all, training_caption, training_scenes

LORA = Path(__file__).parent / "lora" / "mini-neon.safetensors"
RANK = 8
_LAYERS = re.compile(r"\.(attn\d\.to_([qkv]|out\.0)|ff\.net\.0\.proj|ff\.net\.2|conv\d)$")


def layers(checkpoint: Checkpoint) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """The layers that change, with their names in LoRA files (those of kohya-ss's scripts)."""
    for name, layer in checkpoint.unet.named_modules():
        if _LAYERS.search(name):
            yield "lora_unet_" + name.replace(".", "_"), layer


def make_lora(checkpoint: Checkpoint) -> nn.ModuleDict:
    """The low-rank pair of every layer; the second of each starts at zero, so that nothing changes at first."""
    lora = {}
    for name, layer in layers(checkpoint):
        if isinstance(layer, nn.Linear):
            down, up = nn.Linear(layer.in_features, RANK, bias=False), nn.Linear(RANK, layer.out_features, bias=False)
        else:
            down = nn.Conv2d(layer.in_channels, RANK, layer.kernel_size, layer.stride, layer.padding, bias=False)
            up = nn.Conv2d(RANK, layer.out_channels, 1, bias=False)
        nn.init.zeros_(up.weight)
        lora[name] = nn.ModuleDict({"lora_down": down, "lora_up": up})
    return nn.ModuleDict(lora)


def with_lora(checkpoint: Checkpoint, tensors: dict[str, Tensor], strength: float = 1.0) -> Checkpoint:
    """A copy of the checkpoint with a LoRA of this file in the weights of its U-Net, which may be inflated."""
    checkpoint = dataclasses.replace(checkpoint, unet=copy.deepcopy(checkpoint.unet))
    for name, layer in layers(checkpoint):
        down, up = (tensors[f"{name}.{part}.weight"].to(layer.weight).flatten(1) for part in ("lora_down", "lora_up"))
        layer.weight.data += strength * (up @ down).view_as(layer.weight)
    return checkpoint


def train_lora(
    work: Path, checkpoint_folder: Path, device: torch.device, renders: int, steps: int, batch: int, lr: float
):
    """Noise prediction; the checkpoint itself is frozen."""
    torch.manual_seed(5)
    checkpoint, scenes = load_checkpoint(checkpoint_folder, device=device), training_scenes(renders)
    pictures = render_all([dataclasses.replace(scene, style="neon") for scene in scenes], work / "lora_renders.npy")
    mean, std = encode_all(checkpoint.vae, pictures, work / "lora_moments.npy", device)
    scenes = [dataclasses.replace(scene, style="plain") for scene in scenes]  # as their captions have it
    scale = checkpoint.vae.config.scaling_factor
    lora = make_lora(checkpoint).to(device)
    for name, layer in layers(checkpoint):
        pair = lora[name]
        layer.register_forward_hook(
            lambda _, inputs, out, pair=pair: out + pair["lora_up"](pair["lora_down"](inputs[0]))
        )

    def loss_of_step(step: int) -> Tensor:
        words = random.Random(step)
        chosen, noisy, t, noise, weight = noisy_batch(mean, std, scale, batch, np.random.default_rng((5, step)), device)
        text = encode_prompt(checkpoint, [training_caption(scenes[i], words) for i in chosen])
        with autocast(device):
            predicted = checkpoint.unet(noisy, t, text).sample
        return (weight * (predicted.float() - noise).square()).mean()

    fit(lora, loss_of_step, work / "lora.safetensors", steps=steps, lr=lr, ema=0.995)


def export_lora(work: Path, output: Path):
    """Writes `lora/mini-neon.safetensors` in fp16, as the LoRA loaders of ComfyUI and others read it."""
    lora = load_average(make_lora(load_checkpoint(output / "checkpoint")), work / "lora.safetensors")
    tensors = {name: tensor.half().contiguous() for name, tensor in lora.state_dict().items()}
    tensors |= {f"{name}.alpha": torch.tensor(float(RANK)) for name in lora}
    path = output / "lora" / LORA.name
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def load_lora() -> dict[str, Tensor]:
    """The tensors of the LoRA that ships with the pack."""
    return load_file(LORA)
