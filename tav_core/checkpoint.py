"""Text-to-image checkpoints: loading them, and moving text and video in and out of their latent space."""

import json
import re
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, ModelMixin, UNet2DConditionModel
from diffusers.utils import is_torch_version
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .errors import TavError
from .inflation import VideoUNet, inflate
from .video import to_frames

CONFIGS = Path(__file__).parent / "configs"
MINI = Path(__file__).parent / "mini" / "checkpoint"
MINI_CONTROLNET = MINI.parent / "controlnet"
SD_PREDICTION_TYPES = ("epsilon", "v_prediction")  # that Stable Diffusion 1.x and 2.x was trained for
_VAE_PIXELS = 2 * 512 * 512  # at once
_PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
_OPEN_CLIP = {  # names of OpenCLIP, and those of transformers
    "token_embedding": "embeddings.token_embedding", "positional_embedding": "embeddings.position_embedding.weight",
    "transformer.resblocks": "encoder.layers", "attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1",
    "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "ln_final": "final_layer_norm",
}  # fmt: skip


class _Unfit(Exception):
    """A file or folder that can't be loaded: the problem and the remedy of a `TavError`."""


@dataclass
class Checkpoint:
    """The parts of a latent diffusion model, frozen and in evaluation mode.

    Attributes:
        unet: a `VideoUNet` if it is a published Tune-A-Video model.
    """

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

    A folder that the authors' code saved (TuneAVideoPipeline) gives a `VideoUNet`, tuned as it is.

    Args:
        prediction_type: "epsilon" or "v_prediction"; by default what the folder's scheduler says. A single file
            can't tell, so there it is "v_prediction" where an SD 2.x file's metadata or name speaks of 768 pixels
            or of v ("v2-1_768-ema-pruned", "...-v.safetensors"), and "epsilon" everywhere else.
        config: a folder of diffusers configurations (and a tokenizer, if it has one) for a single file of an
            unusual layout. Unused with a folder.

    Raises:
        TavError: missing or broken files, a pickle as single file, or a model of another family (SDXL, SD3, Flux,
            inpainting, other video models).
    """
    if prediction_type not in (None, *SD_PREDICTION_TYPES):
        raise TavError("prediction_type", prediction_type, "is unknown", "choose epsilon or v_prediction")
    path = MINI if str(name_or_path) == "mini" else Path(name_or_path)
    if not path.exists():
        raise TavError(
            "checkpoint", name_or_path, "does not exist", "give a diffusers folder, a .safetensors file or mini"
        )
    if config is not None and not Path(config).is_dir():
        raise TavError("config", config, "is not a folder", "give one with unet, vae, text_encoder and scheduler in it")
    with _reading("checkpoint", name_or_path):
        parts = _load_folder(path) if path.is_dir() else _load_file(path, prediction_type, config)
    if prediction_type is not None:
        parts["scheduler"].register_to_config(prediction_type=prediction_type)
    for part in _PREFIXES:
        # the plain `to`, because that of diffusers warns of modules that there aren't
        nn.Module.to(parts[part], device=device, dtype=dtype).eval().requires_grad_(False)
    return Checkpoint(name="mini" if path == MINI else path.stem if path.is_file() else path.name, **parts)


def load_controlnet(path: str | Path) -> ControlNetModel:
    """Loads "mini", whose hint is the subject's silhouette, or a diffusers folder of a ControlNet for SD 1.x or 2.x.

    Returns: float32, on the CPU, frozen and in evaluation mode.

    Raises:
        TavError: missing or broken files, pickled weights, or another kind of model (ControlNets of SDXL, SD3, Flux).
    """
    path = MINI_CONTROLNET if str(path) == "mini" else Path(path)
    with _reading("controlnet", path):
        config = json.loads((path / "config.json").read_text())
        kind = config.get("_class_name")
        if kind != "ControlNetModel":
            raise _Unfit(f"is a {kind}", "give a folder with a ControlNetModel of diffusers")
        if config.get("addition_embed_type") or config.get("class_embed_type") or config.get("encoder_hid_dim"):
            raise _Unfit("is conditioned on more than text, as those of SDXL", "give one for SD 1.x or 2.x")
        if not any(path.glob("diffusion_pytorch_model*.safetensors")):
            raise _Unfit("holds no .safetensors weights", "save it with safe_serialization=True")
        return _load_part(path, ControlNetModel).eval().requires_grad_(False)


@contextmanager
def _reading(field: str, value: str | Path) -> Iterator[None]:
    """What fails inside is a `TavError` of that file or folder."""
    try:
        yield
    except _Unfit as error:
        raise TavError(field, value, *error.args) from None
    except Exception as error:  # the libraries fail in every way over a damaged file
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 240)
        raise TavError(field, value, f"can't be read ({reason})", "download or save it again") from error


def _load_folder(path: Path) -> dict:
    if not (path / "unet" / "config.json").exists():
        other = "a transformer model such as SD3 or Flux" if (path / "transformer").exists() else "no diffusers model"
        raise _Unfit(f"is {other} (it has no unet folder)", "give a Stable Diffusion 1.x or 2.x folder")
    unet_config = json.loads((path / "unet" / "config.json").read_text())
    _refuse(unet_config.get("in_channels", 4), "text_encoder_2" if (path / "text_encoder_2").exists() else "")
    if lost := [part for part in ("vae", "text_encoder", "tokenizer", "scheduler") if not (path / part).is_dir()]:
        remedy = "download the whole folder, or copy them from the model that its unet was tuned from"
        raise _Unfit(f"lacks {', '.join(lost)}", remedy)
    for part in ("unet", "vae", "text_encoder"):
        if not _weight_files(path / part):
            raise _Unfit(f"holds no weights in {part}", "download the whole folder")
    tokenizer = {file.name for file in (path / "tokenizer").glob("*")}
    if not ("tokenizer.json" in tokenizer or {"vocab.json", "merges.txt"} <= tokenizer):
        raise _Unfit("lacks tokenizer/vocab.json or merges.txt", "download the whole folder")
    for file in ("vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"):
        if not (path / file).exists():
            raise _Unfit(f"lacks {file}", "download the whole folder")
        if not isinstance(json.loads((path / file).read_text()), dict):  # diffusers would look for it on the network
            raise _Unfit(f"has no JSON object in {file}", "download that file again")
    tensors = {}
    for file in _weight_files(path / "text_encoder"):
        tensors |= _load_weights(file)
    video = unet_config.get("_class_name") == "UNet3DConditionModel"
    return dict(
        unet=_load_video_unet(path / "unet") if video else _load_part(path / "unet", UNet2DConditionModel),
        vae=_load_part(path / "vae", AutoencoderKL),
        text_encoder=_text_encoder(path, tensors),
        tokenizer=CLIPTokenizer.from_pretrained(path / "tokenizer", local_files_only=True),
        scheduler=_scheduler(path),
    )


def _weight_files(path: Path) -> list[Path]:
    """Pickled files serve where there are no others, and so do those of half precision.

    Raises:
        _Unfit: pickled files, and a torch that can't keep them from running code.
    """
    files = list(path.glob("*.safetensors"))
    if (
        not files and (files := list(path.glob("*pytorch_model*.bin"))) and not is_torch_version(">=", "2.6")
    ):  # CVE-2025-32434
        raise _Unfit(
            f"holds pickled weights ({path.name}/*.bin), which torch {torch.__version__} can't read safely",
            "update torch to 2.6, or save the model with safe_serialization=True",
        )
    return [file for file in files if "fp16" not in file.name] or files


def _load_weights(file: Path) -> dict[str, Tensor]:
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)


def _load_part(path: Path, kind: type[ModelMixin]) -> ModelMixin:
    file = _weight_files(path)[0]
    variant = "fp16" if "fp16" in file.name else None
    model, loaded = kind.from_pretrained(
        path,
        local_files_only=True,
        use_safetensors=file.suffix == ".safetensors",
        variant=variant,
        output_loading_info=True,
        low_cpu_mem_usage=False,
    )
    if lost := sorted(loaded["missing_keys"]):  # diffusers would go on with random weights
        raise _lacking(lost, path.name)
    return model


def _lacking(lost: list[str], part: str) -> _Unfit:
    return _Unfit(f"lacks {len(lost)} of its weights ({part}: {lost[0]}, ...)", "download it again")


def _load_video_unet(path: Path) -> VideoUNet:
    """The tuned U-Net that the authors' code saved: an image model under 3D names, parameters named as by `inflate`.

    Raises:
        _Unfit: another video model that goes by the same class name (ModelScope), or lost weights.
    """
    tensors = {name: value for file in _weight_files(path) for name, value in _load_weights(file).items()}
    if not any(".attn_temp." in name for name in tensors):
        raise _Unfit(
            "is another kind of video model, such as ModelScope's",
            "give one of Tune-A-Video, or a Stable Diffusion 1.x or 2.x text-to-image model",
        )
    # UNet3DConditionModel, CrossAttnDownBlock3D, UNetMidBlock3DCrossAttn ...
    config = json.loads((path / "config.json").read_text().replace("3D", "2D"))
    with torch.device("meta"):
        unet = inflate(UNet2DConditionModel.from_config(config))
    own = unet.state_dict().keys()
    if lost := sorted(own - tensors.keys()):
        raise _lacking(lost, path.name)
    if more := sorted(tensors.keys() - own):
        raise _Unfit(
            f"is a changed kind of Tune-A-Video model (it has {more[0]})", "give one that the original code saved"
        )
    unet.load_state_dict(tensors, assign=True)
    return unet


def _text_encoder(folder: Path, tensors: dict[str, Tensor]) -> CLIPTextModel:
    """The text encoder of a folder's configuration with those weights, all of which must be there.

    Args:
        tensors: named as in transformers, whose versions differ over a leading `text_model.`, or as in OpenCLIP.
    """
    model = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder", local_files_only=True))
    given = _from_open_clip(tensors) if any("resblocks" in name for name in tensors) else tensors
    given = {name.removeprefix("text_model."): value for name, value in given.items()}
    own = {name.removeprefix("text_model."): name for name in model.state_dict()}
    if lost := sorted(own.keys() - given.keys()):
        raise _lacking(lost, "text_encoder")
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


def _scheduler(folder: Path) -> DDIMScheduler:
    """Whatever scheduler the folder names, its noise schedule is what counts here."""
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return DDIMScheduler.from_config(config, clip_sample=False)


def _load_file(path: Path, prediction_type: str | None, config: str | Path | None) -> dict:
    if path.suffix != ".safetensors":
        raise _Unfit("is not a .safetensors file, and a pickle can run code", "convert it first")
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
        width = _check_family(shapes)
        # only these: a file may hold a second U-Net, its running average
        tensors = {
            part: {key: file.get_tensor(key) for key in shapes if key.startswith(prefix)}
            for part, prefix in _PREFIXES.items()
        }
    for part, prefix in _PREFIXES.items():
        if not tensors[part]:
            raise _Unfit(f"has no {part} ({prefix}*)", "give the full checkpoint, not a part of it")
    second = width == 1024
    folder = Path(config or CONFIGS / ("sd2" if second else "sd1"))
    own = (folder / "tokenizer").is_dir()
    tokenizer = CLIPTokenizer.from_pretrained((folder if own else CONFIGS) / "tokenizer", local_files_only=True)
    if second and not own:
        tokenizer.pad_token = "!"  # id 0, as OpenCLIP pads
    text = {
        re.sub(r"^cond_stage_model\.(transformer|model)\.", "", name): value
        for name, value in tensors["text_encoder"].items()
    }
    parts = dict(
        unet=_convert_part(folder, "unet", UNet2DConditionModel, tensors["unet"]),
        vae=_convert_part(folder, "vae", AutoencoderKL, tensors["vae"]),
        text_encoder=_text_encoder(folder, text),
        tokenizer=tokenizer,
        scheduler=_scheduler(folder),
    )
    says_v = (
        prediction_type == "v_prediction"
        or "768" in path.stem
        or path.stem.endswith("-v")
        or metadata.get("modelspec.prediction_type") == "v"
        or "768-v" in metadata.get("modelspec.architecture", "")
    )
    if second and says_v:
        parts["scheduler"].register_to_config(prediction_type="v_prediction")
        parts["unet"].register_to_config(sample_size=96)
    return parts


def _check_family(shapes: dict[str, list[int]]) -> int:
    """The width of the text embedding that a single file's U-Net takes, from the shapes of its tensors by name."""
    unet = _PREFIXES["unet"]
    others = ("conditioner.", unet + "joint_blocks.", "double_blocks.", unet + "double_blocks.")
    family = next((key for key in shapes if key.startswith(others)), "")
    first, text = f"{unet}input_blocks.0.0.weight", next((k for k in shapes if k.endswith("attn2.to_k.weight")), None)
    if not family and (first not in shapes or text is None):
        raise _Unfit(f"is no Stable Diffusion checkpoint (it lacks {first})", "give an SD 1.x or 2.x file")
    width = shapes[text][1] if text else 0
    _refuse(shapes[first][1] if first in shapes else 4, "conditioner." if width == 2048 else family)
    return width


def _convert_part(folder: Path, part: str, kind: type[ModelMixin], tensors: dict[str, Tensor]) -> ModelMixin:
    model = kind.from_single_file(
        tensors, config=str(folder), subfolder=part, local_files_only=True, low_cpu_mem_usage=False
    )
    # diffusers would go on with random weights in the place of lost ones
    if sum(map(torch.numel, tensors.values())) < sum(map(torch.numel, model.parameters())):
        raise _Unfit(f"lacks some weights of its {part}", "download it again")
    return model


def _refuse(in_channels: int, marker: str):
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
        raise _Unfit(f"is {family}", "give a Stable Diffusion 1.x or 2.x text-to-image model")


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


def _frames_at_once(height: int, width: int) -> int:
    """A VAE of Stable Diffusion takes 3 KB for a pixel."""
    return max(1, _VAE_PIXELS // (height * width))


@torch.no_grad()
def encode_video(checkpoint: Checkpoint, pixels: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's posterior, times its scaling factor, `b c f h w` each (float32).

    Args:
        pixels: `b c f h w` in -1..1.
        chunk: frames that are encoded at once, by default as many as take about 1.6 GB.
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
    """The clip of latents `1 c f h w`, uint8 `f h w c`, on the CPU; `chunk` as in `encode_video`."""
    vae, scale = checkpoint.vae, checkpoint.downscale
    chunk = chunk or _frames_at_once(*(scale * side for side in latents.shape[-2:]))
    frames = rearrange(latents / vae.config.scaling_factor, "1 c f h w -> f c h w").to(vae.device, vae.dtype)
    pixels = torch.cat([vae.decode(part).sample.float().cpu() for part in frames.split(chunk)])
    return to_frames(rearrange(pixels, "f c h w -> 1 c f h w"))
