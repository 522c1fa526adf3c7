"""Checkpoints in a single .safetensors file under the names of the original Stable Diffusion code."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor

from .checkpoint_parts import (
    CONFIGS,
    Unfit,
    load_scheduler,
    load_text_encoder,
    load_tokenizer,
    refuse_family,
    refuse_quantised,
)

_PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
_BLOCKS = {  # of each part, all that its diffusers model has
    "unet": ("time_embed.", "input_blocks.", "middle_block.", "output_blocks.", "out."),
    "vae": ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."),
}
# the bias that tells the U-Nets of SD 2.x for v apart in their weights, as ComfyUI tells them
_V_SIGN, _V_SPREAD = "output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09


def load_file(path: Path, prediction_type: str | None, config: str | Path | None) -> dict:
    """The parts of a `Checkpoint` by name. The arguments are those of `load_checkpoint`.

    Raises:
        Unfit: a pickle, a model of another family, or one with weights that would be lost.
    """
    if path.suffix != ".safetensors":
        raise Unfit("is not a .safetensors file, and a pickle can run code", "convert it first")
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
        width = _check_family(shapes)
        # only these: a file may hold a second U-Net, its running average
        tensors = {
            part: {key.removeprefix(prefix): file.get_tensor(key) for key in shapes if key.startswith(prefix)}
            for part, prefix in _PREFIXES.items()
        }
    marks = {mark: any(key.rsplit(".", 1)[-1] == mark for key in shapes) for mark in ("v_pred", "ztsnr")}
    for part, prefix in _PREFIXES.items():
        tensors[part] = {name: value for name, value in tensors[part].items() if name not in marks}
        if not tensors[part]:
            raise Unfit(f"has no {part} ({prefix}*)", "give the full checkpoint, not a part of it")
        refuse_quantised(tensors[part])
    second = width == 1024
    folder = Path(config or CONFIGS / ("sd2" if second else "sd1"))
    text_encoder = load_text_encoder(
        folder,
        {
            re.sub(r"^(transformer|model)\.", "", name, count=1): value
            for name, value in tensors["text_encoder"].items()
        },
    )
    own = (folder / "tokenizer").is_dir()
    tokenizer = load_tokenizer((folder if own else CONFIGS) / "tokenizer", text_encoder)
    if second and not own:
        tokenizer.pad_token = "!"  # id 0, as OpenCLIP pads
    predicts = prediction_type or _prediction_type(path.stem, metadata, marks, tensors["unet"] if second else {})
    changes = {"prediction_type": predicts} | ({"rescale_betas_zero_snr": True} if marks["ztsnr"] else {})
    parts = dict(
        unet=_convert_part(folder, "unet", UNet2DConditionModel, tensors["unet"]),
        vae=_convert_part(folder, "vae", AutoencoderKL, tensors["vae"]),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=load_scheduler(folder, **changes),
    )
    if second and predicts == "v_prediction":
        parts["unet"].register_to_config(sample_size=96)
    return parts


def _check_family(shapes: dict[str, list[int]]) -> int:
    """The width of the text embedding that a single file's U-Net takes, from the shapes of its tensors by name."""
    unet = _PREFIXES["unet"]
    others = ("conditioner.", unet + "joint_blocks.", "double_blocks.", unet + "double_blocks.")
    family = next((key for key in shapes if key.startswith(others)), "")
    first, text = f"{unet}input_blocks.0.0.weight", next((k for k in shapes if k.endswith("attn2.to_k.weight")), None)
    if not family and (first not in shapes or text is None):
        raise Unfit(f"is no Stable Diffusion checkpoint (it lacks {first})", "give an SD 1.x or 2.x file")
    width = shapes[text][1] if text else 0
    refuse_family(shapes[first][1] if first in shapes else 4, "conditioner." if width == 2048 else family)
    if any(key.startswith(unet + "label_emb.") for key in shapes):
        raise Unfit("is an unCLIP model (it has label_emb)", "give a Stable Diffusion 1.x or 2.x text-to-image model")
    return width


def _prediction_type(
    name: str, metadata: Mapping[str, str], marks: Mapping[str, bool], unet: Mapping[str, Tensor]
) -> str:
    """What a file's U-Net predicts: by its metadata, by the marks that ComfyUI leaves, by its weights, or by its name.

    Args:
        unet: the weights of one of SD 2.x; empty for others, whose weights don't tell.
    """
    stated, architecture = metadata.get("modelspec.prediction_type"), metadata.get("modelspec.architecture", "")
    if stated in ("v", "v_prediction", "epsilon"):
        v = stated != "epsilon"
    elif any(marks.values()) or "768-v" in architecture:
        v = True
    elif _V_SIGN in unet and (spread := unet[_V_SIGN].float().std(correction=0)) > 0:  # 0: never trained
        v = spread > _V_SPREAD
    else:
        v = bool(re.search(r"-v$|v[-_ ]?pred", name, re.IGNORECASE)) or bool(unet) and "768" in name
    return "v_prediction" if v else "epsilon"


def _convert_part(folder: Path, part: str, kind: type[ModelMixin], tensors: dict[str, Tensor]) -> ModelMixin:
    used = {name: value for name, value in tensors.items() if name.startswith(_BLOCKS[part])}
    if part == "unet" and len(used) < len(tensors):
        odd = next(name for name in tensors if name not in used)
        raise Unfit(f"has weights that Stable Diffusion hasn't ({part}: {odd})", "give an SD 1.x or 2.x file")
    named = {_PREFIXES[part] + name: value for name, value in used.items()}
    model = kind.from_single_file(
        named, config=str(folder), subfolder=part, local_files_only=True, low_cpu_mem_usage=False
    )
    # diffusers would go on with random weights in the place of lost ones, and without those that it doesn't know
    given, wanted = (sum(map(torch.numel, values)) for values in (used.values(), model.parameters()))
    if given < wanted:
        raise Unfit(f"lacks some weights of its {part}", "download it again")
    if given > wanted:
        problem = f"has more weights in its {part} than {folder.name} has"
        raise Unfit(problem, "give an SD 1.x or 2.x file, or a folder with its configurations")
    return model
