"""Checkpoints in a folder as diffusers saves them, and published Tune-A-Video models."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel
from diffusers.utils import is_torch_version
from safetensors.torch import load_file
from torch import Tensor

from .checkpoint_parts import Unfit, lacking, load_scheduler, load_text_encoder, load_tokenizer, refuse_family
from .inflation import PUBLISHED, VideoUNet


def load_folder(path: Path) -> dict:
    """The parts of a `Checkpoint` by name.

    Raises:
        Unfit: a model of another family, or one that lacks something.
    """
    if not (path / "unet" / "config.json").exists():
        other = "a transformer model such as SD3 or Flux" if (path / "transformer").exists() else "no diffusers model"
        raise Unfit(f"is {other} (it has no unet folder)", "give a Stable Diffusion 1.x or 2.x folder")
    unet_config = json.loads((path / "unet" / "config.json").read_text())
    refuse_family(unet_config.get("in_channels", 4), "text_encoder_2" if (path / "text_encoder_2").exists() else "")
    if lost := [part for part in ("vae", "text_encoder", "tokenizer", "scheduler") if not (path / part).is_dir()]:
        remedy = "download the whole folder, or copy them from the model that its unet was tuned from"
        raise Unfit(f"lacks {', '.join(lost)}", remedy)
    for part in ("unet", "vae", "text_encoder"):
        if not _weight_files(path / part):
            raise Unfit(f"holds no weights in {part}", "download the whole folder")
    tokenizer = {file.name for file in (path / "tokenizer").glob("*")}
    if not ("tokenizer.json" in tokenizer or {"vocab.json", "merges.txt"} <= tokenizer):
        raise Unfit("lacks tokenizer/vocab.json or merges.txt", "download the whole folder")
    for file in ("vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"):
        if not (path / file).exists():
            raise Unfit(f"lacks {file}", "download the whole folder")
        if not isinstance(json.loads((path / file).read_text()), dict):  # diffusers would look for it on the network
            raise Unfit(f"has no JSON object in {file}", "download that file again")
    scheduler = load_scheduler(path)
    text_encoder = load_text_encoder(path, _all_weights(path / "text_encoder"))
    tokenizer = load_tokenizer(path / "tokenizer", text_encoder)
    video = unet_config.get("_class_name") in PUBLISHED
    unet = _load_video_unet(path / "unet") if video else load_part(path / "unet", UNet2DConditionModel)
    vae = load_part(path / "vae", AutoencoderKL)
    return dict(unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)


def _weight_files(path: Path) -> list[Path]:
    """Pickled files serve where there are no others, and so do those of half precision.

    Raises:
        Unfit: pickled files, and a torch that can't keep them from running code.
    """
    files = list(path.glob("*.safetensors"))
    if (
        not files and (files := list(path.glob("*pytorch_model*.bin"))) and not is_torch_version(">=", "2.6")
    ):  # CVE-2025-32434
        raise Unfit(
            f"holds pickled weights ({path.name}/*.bin), which torch {torch.__version__} can't read safely",
            "update torch to 2.6, or save the model with safe_serialization=True",
        )
    return [file for file in files if "fp16" not in file.name] or files


def _all_weights(path: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in _weight_files(path):
        pickled = file.suffix != ".safetensors"
        tensors |= torch.load(file, map_location="cpu", weights_only=True) if pickled else load_file(file)
    return tensors


def load_part(path: Path, kind: type[ModelMixin]) -> ModelMixin:
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
        raise lacking(lost, path.name)
    if more := sorted(loaded["unexpected_keys"]):  # and without these
        problem = f"holds weights that its configuration doesn't know ({path.name}: {more[0]}, ...)"
        raise Unfit(problem, "give a Stable Diffusion 1.x or 2.x text-to-image model")
    return model


def _load_video_unet(path: Path) -> VideoUNet:
    """The tuned U-Net that the authors' code or `VideoUNet.save_pretrained` saved.

    Raises:
        Unfit: another video model that goes by the same class name (ModelScope), or lost weights.
    """
    tensors = _all_weights(path)
    if not any(".attn_temp." in name for name in tensors):
        raise Unfit(
            "is another kind of video model, such as ModelScope's",
            "give one of Tune-A-Video, or a Stable Diffusion 1.x or 2.x text-to-image model",
        )
    with torch.device("meta"):
        unet = VideoUNet.from_config(json.loads((path / "config.json").read_text()))
    own = unet.state_dict().keys()
    if lost := sorted(own - tensors.keys()):
        raise lacking(lost, path.name)
    if more := sorted(tensors.keys() - own):
        raise Unfit(
            f"is a changed kind of Tune-A-Video model (it has {more[0]})", "give one that the original code saved"
        )
    unet.load_state_dict(tensors, assign=True)
    return unet
