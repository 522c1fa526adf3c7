"""Text-to-image checkpoints: loading them, and moving text and video in and out of their latent space."""

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from .errors import TavError
from .video import to_frames

CONFIGS = Path(__file__).parent / "configs"
MINI = Path(__file__).parent / "mini" / "checkpoint"
PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass
class Checkpoint:
    """The parts of a latent diffusion model, frozen and in evaluation mode."""

    name: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler

    @property
    def downscale(self) -> int:
        """Pixels a latent, along each side. Frames must be a multiple of it."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def size(self) -> int:
        """The side, in pixels, of the pictures that it was trained on."""
        return self.unet.config.sample_size * self.downscale


def load_checkpoint(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    prediction_type: str | None = None,
    config: str | Path | None = None,
) -> Checkpoint:
    """Loads "mini", a diffusers folder, or a single `.safetensors` file of SD 1.x or 2.x. Never uses the network.

    Args:
        prediction_type: "epsilon" or "v_prediction"; by default what the folder's scheduler says. A single file
            can't tell, so there it is "v_prediction" where an SD 2.x file's metadata or name speaks of 768 pixels
            or of v ("v2-1_768-ema-pruned", "...-v.safetensors"), and "epsilon" everywhere else.
        config: a folder of diffusers configurations (and a tokenizer, if it has one) for a single file of an
            unusual layout.

    Raises:
        TavError: missing or broken files, pickled weights, or a model of another family (SDXL, SD3, Flux,
            inpainting).
    """
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise TavError(f"prediction_type={prediction_type!r} is unknown; choose epsilon or v_prediction")
    path = MINI if str(name_or_path) == "mini" else Path(name_or_path)
    if not path.exists():
        raise TavError(f"--checkpoint {name_or_path} does not exist; give a diffusers folder, a .safetensors file or mini")
    try:
        parts = _load_folder(path) if path.is_dir() else _load_file(path, prediction_type, config)
    except (OSError, SafetensorError, RuntimeError, KeyError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TavError(f"--checkpoint {name_or_path} can't be read ({reason}); download or save it again") from error
    if prediction_type is not None:
        parts["scheduler"].register_to_config(prediction_type=prediction_type)
    for part in ("unet", "vae", "text_encoder"):
        parts[part].to(device=device, dtype=dtype).eval().requires_grad_(False)
    return Checkpoint(name="mini" if path == MINI else path.stem if path.is_file() else path.name, **parts)


def _load_folder(path: Path) -> dict:
    if not (path / "unet" / "config.json").exists():
        other = "a transformer model such as SD3 or Flux" if (path / "transformer").exists() else "no diffusers model"
        raise TavError(f"--checkpoint {path} is {other} (it has no unet folder); give a Stable Diffusion 1.x or 2.x folder")
    unet_config = json.loads((path / "unet" / "config.json").read_text())
    _refuse(path, unet_config.get("in_channels", 4), "text_encoder_2" if (path / "text_encoder_2").exists() else "")
    for part in ("unet", "vae", "text_encoder"):
        if not any((path / part).glob("*.safetensors")):
            pickled = any((path / part).glob("*.bin"))
            what = "only pickled weights (.bin), which can run code" if pickled else "no weights"
            raise TavError(f"--checkpoint {path}/{part} holds {what}; save the model with safe_serialization=True")
    for part, file in (("tokenizer", "tokenizer_config.json"), ("scheduler", "scheduler_config.json")):
        if not (path / part / file).exists():
            raise TavError(f"--checkpoint {path} lacks {part}/{file}; download the whole folder")
    return dict(
        unet=_load_part(path / "unet", UNet2DConditionModel, low_cpu_mem_usage=False),
        vae=_load_part(path / "vae", AutoencoderKL, low_cpu_mem_usage=False),
        text_encoder=_load_part(path / "text_encoder", CLIPTextModel),
        tokenizer=CLIPTokenizer.from_pretrained(path / "tokenizer", local_files_only=True),
        # whatever scheduler the folder names, its noise schedule is what counts here
        scheduler=DDIMScheduler.from_config(
            json.loads((path / "scheduler" / "scheduler_config.json").read_text()), clip_sample=False
        ),
    )


def _load_part(path: Path, kind: type, **options):
    """A model from a folder; the half-precision files serve where there are no others."""
    variant = None if any("fp16" not in file.name for file in path.glob("*.safetensors")) else "fp16"
    model, loaded = kind.from_pretrained(path, local_files_only=True, use_safetensors=True, variant=variant,
                                         output_loading_info=True, **options)  # fmt: skip
    if lost := sorted(loaded["missing_keys"]):  # the libraries would go on with random weights
        raise TavError(f"--checkpoint {path} lacks {len(lost)} of its weights ({lost[0]}, ...); download it again")
    return model


def _load_file(path: Path, prediction_type: str | None, config: str | Path | None) -> dict:
    from diffusers import StableDiffusionPipeline  # slow to import, needed here alone

    if path.suffix != ".safetensors":
        raise TavError(f"--checkpoint {path} is not a .safetensors file, and a pickle can run code; convert it first")
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    unet = "model.diffusion_model."
    family = next((key for key in shapes if key.startswith(("conditioner.", unet + "joint_blocks.", "double_blocks.",
                                                           unet + "double_blocks."))), "")  # fmt: skip
    first, text = f"{unet}input_blocks.0.0.weight", next((k for k in shapes if k.endswith("attn2.to_k.weight")), None)
    if not family and (first not in shapes or text is None):
        raise TavError(f"--checkpoint {path} is no Stable Diffusion checkpoint (it lacks {first}); give an SD 1.x or 2.x file")
    _refuse(path, shapes[first][1] if first in shapes else 4, "conditioner." if text and shapes[text][1] == 2048 else family)
    prefixes = {"unet": unet, "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
    held = {part: sum(math.prod(shape) for key, shape in shapes.items() if key.startswith(prefix))
            for part, prefix in prefixes.items()}  # fmt: skip
    for part, prefix in prefixes.items():
        if not held[part]:
            raise TavError(f"--checkpoint {path} has no {part} ({prefix}*); give the full checkpoint, not a part of it")
    second = shapes[text][1] == 1024
    says_v = ("768" in path.stem or path.stem.endswith("-v") or metadata.get("modelspec.prediction_type") == "v"
              or "768-v" in metadata.get("modelspec.architecture", ""))  # fmt: skip
    own = config is not None and (Path(config) / "tokenizer").is_dir()
    tokenizer = CLIPTokenizer.from_pretrained(Path(config if own else CONFIGS) / "tokenizer", local_files_only=True)
    if second and not own:
        tokenizer.pad_token = "!"  # id 0, as OpenCLIP pads
    pipeline = StableDiffusionPipeline.from_single_file(
        path, config=str(config or CONFIGS / ("sd2" if second else "sd1")), local_files_only=True, tokenizer=tokenizer,
        safety_checker=None, feature_extractor=None,
    )  # fmt: skip
    for part in held:  # the libraries would go on with random weights in the place of lost ones
        if held[part] < sum(parameter.numel() for parameter in getattr(pipeline, part).parameters()):
            raise TavError(f"--checkpoint {path} lacks some weights of its {part}; download it again")
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    if second and says_v:
        scheduler.register_to_config(prediction_type="v_prediction")
        pipeline.unet.register_to_config(sample_size=96)
    return dict(unet=pipeline.unet, vae=pipeline.vae, text_encoder=pipeline.text_encoder, tokenizer=tokenizer,
                scheduler=scheduler)  # fmt: skip


def _refuse(path: Path, in_channels: int, marker: str):
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
        raise TavError(f"--checkpoint {path} is {family}; give a Stable Diffusion 1.x or 2.x text-to-image model")


@torch.no_grad()
def encode_prompt(checkpoint: Checkpoint, prompt: str | list[str]) -> Tensor:
    """The text embedding, float32 `b n d`; n is the tokenizer's full length. Warns of words beyond it."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    tokenizer, length = checkpoint.tokenizer, checkpoint.tokenizer.model_max_length
    for text in prompts:
        ids = tokenizer(text).input_ids
        if len(ids) > length:
            lost = tokenizer.decode(ids[length - 1 : -1])
            warnings.warn(f"the prompt is longer than {length} tokens; ignored: {lost!r}", stacklevel=2)
    ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return checkpoint.text_encoder(ids.to(checkpoint.text_encoder.device)).last_hidden_state.float()


@torch.no_grad()
def encode_video(checkpoint: Checkpoint, pixels: Tensor, chunk: int = 8) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's posterior, times its scaling factor, `b c f h w` each (float32).

    Args:
        pixels: `b c f h w` in -1..1.
        chunk: frames that are encoded at once.
    """
    vae, b = checkpoint.vae, len(pixels)
    frames = rearrange(pixels, "b c f h w -> (b f) c h w").to(vae.device, vae.dtype)
    posteriors = [vae.encode(part).latent_dist for part in frames.split(chunk)]
    moments = (torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors]))
    mean, std = (rearrange(m.float() * vae.config.scaling_factor, "(b f) c h w -> b c f h w", b=b) for m in moments)
    return mean, std


@torch.no_grad()
def decode_video(checkpoint: Checkpoint, latents: Tensor, chunk: int = 8) -> Tensor:
    """The clip of latents `1 c f h w`, uint8 `f h w c`, on the CPU."""
    vae = checkpoint.vae
    frames = rearrange(latents / vae.config.scaling_factor, "1 c f h w -> f c h w").to(vae.device, vae.dtype)
    pixels = torch.cat([vae.decode(part).sample.float().cpu() for part in frames.split(chunk)])
    return to_frames(rearrange(pixels, "f c h w -> 1 c f h w"))
