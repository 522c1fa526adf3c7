"""Text-to-image checkpoints: loading them, and moving text and video in and out of their latent space."""

import json
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from einops import rearrange
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from .checkpoint_file import load_file
from .checkpoint_folder import load_folder, load_part
from .checkpoint_parts import Unfit, check_parts
from .control_file import load_control_file
from .errors import TavError
from .frames import told_numbers
from .inflation import VideoUNet
from .sentences import tokens_of, weigh
from .video import to_frames
from .where import MINI, find_checkpoint

MINI_CONTROLNET = MINI.parent / "controlnet"
SD_PREDICTION_TYPES = ("epsilon", "v_prediction")  # that Stable Diffusion 1.x and 2.x was trained for
_VAE_PIXELS = 2 * 512 * 512  # at once


@dataclass
class Checkpoint:
    """The parts of a latent diffusion model, as `load_checkpoint` gives them: frozen and in evaluation mode.

    They may be on several devices: the U-Net that is tuned is a copy, on that of the VAE.

    Attributes:
        name: of its file or folder.
        unet: predicts noise (or v, see `scheduler`) in latents `b c h w`; a `VideoUNet` if it is a published
            Tune-A-Video model.
        vae: between frames and latents, which it scales by its `scaling_factor`.
        text_encoder, tokenizer: between a sentence and its embedding.
        scheduler: the noise schedule of the training and what the U-Net predicts; read, never stepped.
        loras: those in its weights, each "NAME:STRENGTH (fingerprint)" (see `load_lora`).
        embeddings: fingerprints of textual inversions by the words that stand for them (see `load_embedding`).
        prompt_weights: whether sentences may weigh words, "(word:1.2)", as in ComfyUI; else parentheses are read as
            they stand.
    """

    name: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler
    loras: tuple[str, ...] = ()
    embeddings: Mapping[str, str] = field(default_factory=dict)
    prompt_weights: bool = False

    def __repr__(self) -> str:
        parts = [*self.unet.parameters(), *self.vae.parameters(), *self.text_encoder.parameters()]
        million, kind = sum(map(torch.numel, parts)) / 1e6, self.scheduler.config.prediction_type
        video = ", tuned to video" if isinstance(self.unet, VideoUNet) else ""
        sizes = f"made for {self.size}x{self.size}, {million:.1f} M parameters"
        return f"Checkpoint({self.name!r}{video}, {sizes}, {kind}, {told_numbers(parts)})"

    @property
    def downscale(self) -> int:
        """Pixels a latent, along each side (Stable Diffusion: 8). Frames must be a multiple of it."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def size(self) -> int:
        """The side, in pixels, of the pictures that it was trained on (SD 1.5: 512)."""
        return self.unet.config.sample_size * self.downscale


def load_checkpoint(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    prediction_type: str | None = None,
    config: str | Path | None = None,
    comfyui: str | Path | None = None,
) -> Checkpoint:
    """Loads "mini", a diffusers folder, or a single `.safetensors` file of SD 1.x or 2.x, by its path or its name in a
    ComfyUI's lists or the Hugging Face cache (see `find_checkpoint`). Never uses the network.

    A folder that the authors' code saved (TuneAVideoPipeline) gives a `VideoUNet`, tuned as it is.

    Args:
        dtype: of all parts; `TuneConfig.dtype` says in which one is tuned.
        device: where all parts come to.
        prediction_type: "epsilon" or "v_prediction"; by default what the folder's scheduler says. Of a single file
            the first of these that tells: its metadata (`modelspec`), the keys `v_pred` and `ztsnr` (which also ends
            its noise schedule in pure noise), the weights of an SD 2.x U-Net, and its name ("...-v", "...vpred", for
            SD 2.x "768"); else "epsilon".
        config: a folder of diffusers configurations (and a tokenizer, if it has one) for a single file of an
            unusual layout. Unused with a folder.
        comfyui: a ComfyUI whose names are known; by default that of the environment variable COMFYUI_PATH.

    Raises:
        TavError: missing or broken files, a pickle as single file, or a model of another family (SDXL, SD3, Flux,
            inpainting, other video models).
    """
    if prediction_type not in (None, *SD_PREDICTION_TYPES):
        raise TavError("prediction_type", prediction_type, "is unknown", "choose epsilon or v_prediction")
    path = find_checkpoint(name_or_path, comfyui)
    if config is not None and not Path(config).is_dir():
        raise TavError("config", config, "is not a folder", "give one with unet, vae, text_encoder and scheduler in it")
    with reading("checkpoint", name_or_path):
        parts = load_folder(path) if path.is_dir() else load_file(path, prediction_type, config)
        if prediction_type is not None:
            parts["scheduler"].register_to_config(prediction_type=prediction_type)
        check_parts(parts)
    for part in ("unet", "vae", "text_encoder"):
        # the plain `to`, because that of diffusers warns of modules that there aren't
        nn.Module.to(parts[part], device=device, dtype=dtype).eval().requires_grad_(False)
    return Checkpoint(name=_name(path), **parts)


def _name(path: Path) -> str:
    if path == MINI:
        return "mini"
    if path.parent.name == "snapshots":  # of the Hugging Face cache, which names folders by a hash
        return path.parts[-3].rsplit("--", 1)[-1]
    return path.stem if path.is_file() else path.name


def load_controlnet(path: str | Path, config: str | Path | None = None) -> ControlNetModel:
    """Loads "mini", whose hint is the subject's silhouette, or a ControlNet for SD 1.x or 2.x: a diffusers folder, or a
    single `.safetensors` file with the names of the original code or of diffusers. Never uses the network.

    Args:
        config: a folder of diffusers configurations, with that of its checkpoint's `unet`, for a single file of an
            unusual layout. Unused with a folder.

    Returns: float32, on the CPU, frozen and in evaluation mode.

    Raises:
        TavError: missing or broken files, pickled weights, or another kind of model (ControlNets of SDXL, SD3, Flux,
            Control-LoRAs, T2I-Adapters).
    """
    path = MINI_CONTROLNET if str(path) == "mini" else Path(path)
    with reading("controlnet", path):
        if path.is_file():
            return load_control_file(path, config).eval().requires_grad_(False)
        config = json.loads((path / "config.json").read_text())
        kind = config.get("_class_name")
        if kind != "ControlNetModel":
            raise Unfit(f"is a {kind}", "give a folder with a ControlNetModel of diffusers")
        if config.get("addition_embed_type") or config.get("class_embed_type") or config.get("encoder_hid_dim"):
            raise Unfit("is conditioned on more than text, as those of SDXL", "give one for SD 1.x or 2.x")
        if not any(path.glob("diffusion_pytorch_model*.safetensors")):
            raise Unfit("holds no .safetensors weights", "save it with safe_serialization=True")
        return load_part(path, ControlNetModel).eval().requires_grad_(False)


@contextmanager
def reading(field: str, value: str | Path) -> Iterator[None]:
    """What fails inside is a `TavError` of that file or folder."""
    try:
        yield
    except Unfit as error:
        raise TavError(field, value, *error.args) from None
    except Exception as error:  # the libraries fail in every way over a damaged file
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 240)
        raise TavError(field, value, f"can't be read ({reason})", "download or save it again") from error


@torch.no_grad()
def encode_prompt(checkpoint: Checkpoint, prompt: str | list[str]) -> Tensor:
    """The text embedding, on the device of the text encoder. Warns of words beyond the tokenizer's length.

    Args:
        prompt: a sentence, or one for each of b.

    Returns: float32 `b n d`; n is the tokenizer's full length (Stable Diffusion: 77), d the width of the text encoder.

    Raises:
        TavError: a tokenizer that isn't that of the text encoder.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    tokenizer, length = checkpoint.tokenizer, checkpoint.tokenizer.model_max_length
    ids, weights = [], []
    for text in prompts:
        own, of_words = tokens_of(tokenizer, text, checkpoint.prompt_weights)
        if len(own) > length:
            lost = tokenizer.decode(own[length - 1 : -1])
            warnings.warn(f"the prompt is longer than {length} tokens; ignored: {lost!r}", stacklevel=2)
            own = [*own[: length - 1], own[-1]]
        ids.append(own + [tokenizer.pad_token_id] * (length - len(own)))
        weights.append((of_words + [1.0] * length)[:length])
    ids = torch.tensor(ids)
    if (most := ids.max().item()) >= (known := checkpoint.text_encoder.config.vocab_size):
        problem = f"has a tokenizer that gives token {most}, and a text encoder that knows {known}"
        raise TavError("checkpoint", checkpoint.name, problem, "copy the tokenizer from the model that it was made of")
    embedding = checkpoint.text_encoder(ids.to(checkpoint.text_encoder.device)).last_hidden_state.float()
    if all(weight == 1 for of_words in weights for weight in of_words):
        return embedding
    return weigh(embedding, encode_prompt(checkpoint, ""), torch.tensor(weights))


def _frames_at_once(height: int, width: int) -> int:
    """A VAE of Stable Diffusion takes 3 KB for a pixel."""
    return max(1, _VAE_PIXELS // (height * width))


@torch.no_grad()
def encode_video(checkpoint: Checkpoint, pixels: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's posterior, times its scaling factor.

    Args:
        pixels: `b c f h w` in -1..1 (see `to_pixels`), sides multiples of `Checkpoint.downscale`.
        chunk: frames that are encoded at once, by default as many as take about 1.6 GB.

    Returns: float32 `b c f h w` each, on the device of the VAE; h and w are those of latents.
    """
    vae, b = checkpoint.vae, len(pixels)
    chunk = chunk or _frames_at_once(*pixels.shape[-2:])
    frames = rearrange(pixels, "b c f h w -> (b f) c h w").to(vae.device, vae.dtype)
    posteriors = [vae.encode(part).latent_dist for part in frames.split(chunk)]
    moments = (torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors]))
    mean, std = (rearrange(m.float() * vae.config.scaling_factor, "(b f) c h w -> b c f h w", b=b) for m in moments)
    return mean, std


@torch.no_grad()
def decode_video(checkpoint: Checkpoint, latents: Tensor, chunk: int | None = None) -> Tensor:
    """The clip of latents.

    Args:
        latents: `1 c f h w`, in the scale of `encode_video`, on any device.
        chunk: frames that are decoded at once, as in `encode_video`.

    Returns: uint8 `f h w c`, on the CPU.
    """
    vae, scale = checkpoint.vae, checkpoint.downscale
    chunk = chunk or _frames_at_once(*(scale * side for side in latents.shape[-2:]))
    frames = rearrange(latents / vae.config.scaling_factor, "1 c f h w -> f c h w").to(vae.device, vae.dtype)
    pixels = torch.cat([vae.decode(part).sample.float().cpu() for part in frames.split(chunk)])
    return to_frames(rearrange(pixels, "f c h w -> 1 c f h w"))
