"""Trains the CLIP of the mini world, with which its videos are measured as published ones are with CLIP.

    python -m tav_core.mini train clip --work DIR     # 15 minutes on two CPU cores

It sees what the judge sees: every combination, the unknown content too, every other picture as the VAE decodes it.
Half of a batch are pictures that differ in their subject's shape alone: between random ones everything else tells more.
"""

import random
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from ..checkpoint import load_checkpoint
from . import world
from .train import TOKENS, decode_half, fit, judged_scenes, load_average, render_all, to_pixels

CLIP = Path(__file__).parent / "clip"
SIDE = 64  # pixels that it looks at
GROUP = 8  # pictures of a batch that differ in shape alone
WIDTH, DEPTH, HEADS, JOINT = 96, 3, 4, 64


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    common = dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_attention_heads=HEADS, projection_dim=JOINT)
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=TOKENS, **ends, **common
    )
    vision = CLIPVisionConfig(image_size=SIDE, patch_size=8, num_hidden_layers=DEPTH, **common)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=JOINT))


def make_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return CLIPProcessor(images, tokenizer)


def clip_loss(model: CLIPModel, tokenizer: CLIPTokenizer, pixels: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """The contrastive loss (Radford et al., arXiv 2103.00020); where captions are equal, all of their pictures fit.

    Args:
        pixels: `b 3 h w` in -1..1.
    """
    given = tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    logits = model(**given.to(pixels.device), pixel_values=pixels).logits_per_image
    same = torch.tensor([[a == b for b in captions] for a in captions], device=pixels.device).float()
    wanted = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2


def train_clip(
    work: Path, checkpoint_folder: Path, device: torch.device, renders: int, steps: int, batch: int, lr: float
):
    torch.manual_seed(6)
    checkpoint, scenes = load_checkpoint(checkpoint_folder, device=device), judged_scenes(renders)
    images = decode_half(checkpoint.vae, render_all(scenes, work / "clip_renders.npy"), work / "clip_images.npy")
    model, alike = make_clip(checkpoint.tokenizer).to(device).train(), {}
    for i, scene in enumerate(scenes):
        alike.setdefault((scene.colour, scene.background, scene.style), []).append(i)
    alike = list(alike.values())

    def loss_of_step(step: int) -> torch.Tensor:
        words, rng = random.Random(step), np.random.default_rng((6, step))
        groups = [alike[i] for i in rng.choice(len(alike), max(1, batch // 2 // GROUP))]
        hard = np.concatenate([rng.choice(group, min(GROUP, len(group)), replace=False) for group in groups])
        chosen = np.unique(
            np.concatenate([hard, rng.choice(len(images), min(batch - len(hard), len(images)), replace=False)])
        )
        captions = [world.caption(scenes[i], words.choice(list(world.MOTIONS))) for i in chosen]
        pixels = F.interpolate(to_pixels(images[chosen], device), (SIDE, SIDE), mode="bilinear", antialias=True)
        return clip_loss(model, checkpoint.tokenizer, pixels, captions)

    fit(model, loss_of_step, work / "clip.safetensors", steps=steps, lr=lr, ema=0.998)


def export_clip(work: Path, output: Path):
    """Writes `clip/`, a folder of transformers in fp16."""
    tokenizer = load_checkpoint(output / "checkpoint").tokenizer
    shutil.rmtree(output / "clip", ignore_errors=True)
    load_average(make_clip(tokenizer), work / "clip.safetensors").half().save_pretrained(output / "clip")
    processor = make_processor(tokenizer)
    processor.save_pretrained(output / "clip")
    processor.image_processor.save_pretrained(output / "clip")  # where transformers 4 looks for it
