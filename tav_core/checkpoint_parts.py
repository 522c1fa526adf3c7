"""What a diffusers folder and a single file have in common: the parts of a checkpoint, and what is refused of them."""

import json
import math
import re
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .ddim import PREDICTION_TYPES

CONFIGS = Path(__file__).parent / "configs"
MOST_TIMESTEPS = 100_000  # a schedule is a table of them
_OPEN_CLIP = {  # names of OpenCLIP, and those of transformers
    "token_embedding": "embeddings.token_embedding", "positional_embedding": "embeddings.position_embedding.weight",
    "transformer.resblocks": "encoder.layers", "attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1",
    "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "ln_final": "final_layer_norm",
}  # fmt: skip
_LEAVES = {  # the last part of every name in such models
    "weight", "bias", "in_proj_weight", "in_proj_bias", "position_ids", "positional_embedding", "class_embedding",
    "text_projection", "logit_scale",
}  # fmt: skip


class Unfit(Exception):
    """A file or folder that can't be loaded: the problem and the remedy of a `TavError`."""


def lacking(lost: list[str], part: str) -> Unfit:
    return Unfit(f"lacks {len(lost)} of its weights ({part}: {lost[0]}, ...)", "download it again")


def refuse_family(in_channels: int, marker: str):
    """Names the family of a model that this isn't for."""
    family = None
    if in_channels != 4:
        family = {9: "an inpainting model", 8: "an image-editing model", 5: "a depth model"}.get(in_channels, "unusual")
        family += f" ({in_channels} input channels)"
    elif marker.startswith(("conditioner.", "text_encoder_2")):
        family = "SDXL"
    elif marker:
        family = "a transformer model such as SD3 or Flux"
    if family:
        raise Unfit(f"is {family}", "give a Stable Diffusion 1.x or 2.x text-to-image model")


def refuse_quantised(tensors: dict[str, Tensor]):
    """Numbers that mean something only together with scales beside them ("scaled fp8", bitsandbytes, GPTQ ...)."""
    for name, value in tensors.items():
        if name.rsplit(".", 1)[-1] not in _LEAVES or value.dtype in (torch.int8, torch.uint8):
            problem = f"is quantised (it has {name}), and what belongs to its numbers would be lost"
            raise Unfit(problem, "give the model in fp16, bf16 or fp32")


def load_text_encoder(folder: Path, tensors: dict[str, Tensor]) -> CLIPTextModel:
    """The text encoder of a folder's configuration with those weights, all of which must be there.

    Args:
        tensors: named as in transformers, whose versions differ over a leading `text_model.`, or as in OpenCLIP.
    """
    refuse_quantised(tensors)
    model = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder", local_files_only=True))
    given = _from_open_clip(tensors) if any("resblocks" in name for name in tensors) else tensors
    given = {name.removeprefix("text_model."): value for name, value in given.items()}
    own = {name.removeprefix("text_model."): name for name in model.state_dict()}
    if lost := sorted(own.keys() - given.keys()):
        raise lacking(lost, "text_encoder")
    model.load_state_dict({own[name]: given[name] for name in own})
    return model


def _from_open_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in tensors.items():
        for theirs, ours in _OPEN_CLIP.items():
            name = name.replace(theirs, ours)
        if match := re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", name):  # queries, keys and values in one
            renamed |= {f"{match[1]}.self_attn.{p}_proj.{match[2]}": v for p, v in zip("qkv", value.chunk(3))}
        else:
            renamed[name] = value
    return renamed


def load_tokenizer(folder: Path, text_encoder: CLIPTextModel) -> CLIPTokenizer:
    """The tokenizer of a folder, for no more tokens than the text encoder knows places."""
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    # without a tokenizer_config.json its length is 10^30
    tokenizer.model_max_length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    return tokenizer


def load_scheduler(folder: Path, **changes) -> DDIMScheduler:
    """Whatever scheduler the folder names, its noise schedule is what counts here.

    Raises:
        Unfit: a schedule that is none.
    """
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text()) | changes
    steps = config.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 1 <= steps <= MOST_TIMESTEPS:
        problem = f"has num_train_timesteps {steps!r:.40} in scheduler/scheduler_config.json"
        raise Unfit(problem, "write the model's own number there, which is 1000 for Stable Diffusion")
    scheduler = DDIMScheduler.from_config(config, clip_sample=False)
    alphas = scheduler.alphas_cumprod
    if not (torch.isfinite(alphas).all() and 0 <= alphas.min() and alphas.max() < 1 and (alphas.diff() < 0).all()):
        problem = "has a noise schedule in scheduler/scheduler_config.json that doesn't rise from step to step"
        raise Unfit(problem, "download that file again")
    return scheduler


def check_parts(parts: dict):
    """Parts of different models, and configurations whose numbers make no sense, would surface in the middle of a run.

    Raises:
        Unfit: these parts are no checkpoint.
    """
    unet, vae, text = (parts[name].config for name in ("unet", "vae", "text_encoder"))
    if (predicts := parts["scheduler"].config.prediction_type) not in PREDICTION_TYPES:
        problem = f"has prediction_type {predicts!r:.40} in scheduler/scheduler_config.json"
        raise Unfit(problem, f"write one of {', '.join(PREDICTION_TYPES)} there")
    if unet.sample_size is None:  # diffusers lets it be
        v = parts["scheduler"].config.prediction_type == "v_prediction" and unet.cross_attention_dim == 1024
        parts["unet"].register_to_config(sample_size=96 if v else 64)
    size = parts["unet"].config.sample_size
    if type(size) is not int or not 1 <= size <= 4096:
        raise Unfit(f"has sample_size {size!r:.40} in its unet", "write the side of its latents there, such as 64")
    scale = vae.scaling_factor
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise Unfit(f"has scaling_factor {scale!r:.40} in its vae", "write 0.18215 there, as Stable Diffusion has it")
    if vae.latent_channels != unet.in_channels:
        problem = f"has a vae of {vae.latent_channels} channels and a unet of {unet.in_channels}"
        raise Unfit(problem, "copy the vae from the model that it was made of")
    if unet.cross_attention_dim != text.hidden_size:
        problem = f"has a text_encoder of width {text.hidden_size} and a unet that takes {unet.cross_attention_dim}"
        raise Unfit(problem, "copy the text_encoder from the model that it was made of")
