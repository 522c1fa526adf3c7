"""Quick previews of the small checkpoint: a pixel for each place of the latents, in about the right colour.

A linear map, which previews of larger checkpoints make do with, draws its red brown and its green grey: its few latents
tell colours apart by their surroundings. So this is a small convolutional network, fitted to renders of the world.
"""

import random
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..atomic import atomic_path
from . import world

LATENT_COLOURS = "latent_rgb.safetensors"  # in the folder of the checkpoint
WIDTH = 24
RENDERS = 2000


class LatentColours:
    """Scaled latents `n c h w` to colours in -1..1, `n 3 h w` float32, on their device."""

    def __init__(self, weights: dict[str, Tensor]):
        self.weights = {name: weight.float() for name, weight in weights.items()}

    def __call__(self, latents: Tensor) -> Tensor:
        x, weights = latents.float(), {name: weight.to(latents.device) for name, weight in self.weights.items()}
        for layer in ("0", "2", "4"):
            weight, bias = weights[f"{layer}.weight"], weights[f"{layer}.bias"]
            x = F.conv2d(x if layer == "0" else F.relu(x), weight, bias, padding=weight.shape[-1] // 2)
        return x


def load_latent_colours(path: Path) -> LatentColours:
    return LatentColours(load_file(path))


def encoded(vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    """The scaled latents of uint8 images `n h w 3`."""
    with torch.inference_mode():
        pixels = rearrange(torch.from_numpy(images), "n h w c -> n c h w").to(vae.device).float() / 127.5 - 1
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(16)])
    return latents.cpu() * vae.config.scaling_factor


def downscaled(images: np.ndarray, size: tuple[int, int]) -> Tensor:
    """The colours in -1..1 that previews of uint8 images should have, `n 3 h w`."""
    small = np.stack([cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA) for image in images])
    return rearrange(torch.from_numpy(small).float() / 127.5 - 1, "n h w c -> n c h w")


def fit_latent_colours(latents: Tensor, colours: Tensor, steps: int = 2500) -> dict[str, Tensor]:
    """The weights of `LatentColours` that draw the colours (`n 3 h w`) of scaled latents with the least absolute error.

    Saturated colours count four times as much: they are the few pixels of the subject.
    """
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(latents.shape[1], WIDTH, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(WIDTH, 3, 1),
    )
    counts = 1 + 3 * (colours.amax(1, keepdim=True) - colours.amin(1, keepdim=True) > 1)
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.015, steps)
    for _ in range(steps):
        chosen = torch.randint(len(latents), (32,))
        drawn = net(latents[chosen]).clamp(-1.1, 1.1)  # previews are clamped to -1..1
        loss = (counts[chosen] * (drawn - colours[chosen]).abs()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: weight.detach().half() for name, weight in net.state_dict().items()}


def write_latent_colours(vae: AutoencoderKL, path: Path, steps: int = 2500):
    """Fits them to fresh renders and writes the file."""
    rng = random.Random(7)
    images = np.stack([world.render(world.random_scene(rng)) for _ in range(RENDERS)])
    latents = encoded(vae, images)
    with atomic_path(path) as temporary:
        save_file(fit_latent_colours(latents, downscaled(images, latents.shape[2:]), steps), temporary)
