"""LoRAs (Hu et al., arXiv 2106.09685): low-rank changes of a checkpoint's weights, made part of them.

Files of kohya's scripts, of diffusers in its old and its present form, and of peft are read; diffusers brings their
names to one form. What isn't a plain product of two matrices, such as LoHa or DoRA, is refused: ComfyUI's own loaders
take those.
"""

import copy
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from diffusers.utils.state_dict_utils import StateDictType
from safetensors import safe_open
from torch import Tensor, nn

from .checkpoint import Checkpoint, reading
from .checkpoint_parts import Unfit
from .errors import TavError
from .inflation import VideoUNet
from .limits import check
from .stored import Damaged, check_finite
from .tuning_state import hash_tensors

_OTHERS = {"hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "oft_": "OFT",
           "boft_": "BOFT", "lora_mid": "LoCon with a third factor", "on_input": "(IA)3", ".diff": "whole weights",
           "a1.weight": "GLoRA"}  # fmt: skip
_FACTORS = ("lora_A", "lora_B")  # down and up, as peft names them
_PLAIN = "give a plain LoRA, or a checkpoint that it was merged into"
_FAMILY = "give one that was made for checkpoints of this family"


def load_lora(checkpoint: Checkpoint, path: str | Path, strength: float = 1.0) -> Checkpoint:
    """The checkpoint with a LoRA in the weights of its U-Net (which may be inflated) and its text encoder.

    Every matrix W that the file names becomes W + strength alpha / rank (up down). The given checkpoint stays as it is;
    weights that the LoRA doesn't change are shared with it.

    Args:
        path: a .safetensors file of kohya's scripts, diffusers or peft.
        strength: -10 ... 10; 1 is as it was trained.

    Raises:
        TavError: missing or damaged files, a pickle, another kind of adapter than a plain LoRA, one that names what the
            checkpoint hasn't (SDXL, other families), a strength out of range.
    """
    check(lora_strength=strength)
    path = Path(path)
    with reading("lora", path):
        changes = _changes(path, checkpoint)
        parts = {name: _changed(name, getattr(checkpoint, name), of, strength) for name, of in changes.items()}
    told = f"{path.stem}:{strength:g}"
    digest = hash_tensors(tensor for of in changes.values() for name in sorted(of) for tensor in of[name])
    loras = (*checkpoint.loras, f"{told} ({digest[:8]})")
    return replace(checkpoint, name=f"{checkpoint.name} + {told}", loras=loras, **parts)


def with_loras(
    checkpoint: Checkpoint, unet: VideoUNet, loras: Sequence[tuple[str | Path, float]]
) -> tuple[Checkpoint, VideoUNet]:
    """A checkpoint and a U-Net tuned on it with LoRAs, files and strengths, for edits alone.

    Before the tuning, which sees the clip without it, a style would be unlearned.

    Raises:
        TavError: see `load_lora`; about the field "edit_lora".
    """
    styled = replace(checkpoint, unet=unet)
    try:
        for path, strength in loras:
            styled = load_lora(styled, path, strength)
    except TavError as error:
        raise TavError("edit_lora", error.value, error.problem, error.remedy) from error
    return styled, styled.unet


def _changes(path: Path, checkpoint: Checkpoint) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Down and up of every module, scaled by alpha, by the part of a `Checkpoint` and the module's name.

    Raises:
        Unfit: what `load_lora` refuses.
    """
    if path.suffix.lower() != ".safetensors":
        raise Unfit("is not a .safetensors file, and a pickle can run code", "convert it first")
    if not path.is_file():
        raise Unfit("is no file" if path.exists() else "does not exist", "give a .safetensors file of a LoRA")
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    for key in tensors:
        if kind := next((kind for mark, kind in _OTHERS.items() if mark in key), None):
            raise Unfit(f"is no plain LoRA but {kind} (it has {key})", _PLAIN)
    try:
        check_finite(tensors)
    except Damaged as error:
        raise Unfit(f"is damaged ({error})", "download it again") from error
    factors, scales = defaultdict(dict), _scales(metadata)
    for key, tensor in _as_of_peft(tensors, checkpoint).items():
        name, _, factor = key.removesuffix(".weight").rpartition(".")
        if factor not in _FACTORS:
            raise Unfit(f"holds what is no LoRA's ({key})", _PLAIN)
        factors[name][factor] = tensor.float()
    changes = defaultdict(dict)
    for name, both in factors.items():
        part, _, module = name.partition(".")
        if part == "text_encoder_2":
            raise Unfit("is for SDXL (it changes a second text encoder)", _FAMILY)
        if part not in ("unet", "text_encoder"):
            raise Unfit(f"names {name}, which is no part of Stable Diffusion", _FAMILY)
        if len(both) < 2:
            raise Unfit(f"lacks the other factor of {name}", "download it again")
        down, up = (both[factor].flatten(1) for factor in _FACTORS)
        changes[part][module] = down, up * scales(name, len(down))
    if not changes:
        raise Unfit("holds nothing", "give a .safetensors file of a LoRA")
    return changes


def _scales(metadata: Mapping[str, str]) -> Callable[[str, int], float]:
    """Alpha / rank of a module, as diffusers notes them in a file's metadata; those of kohya stand in its tensors."""
    told = json.loads(metadata.get("lora_adapter_metadata", "{}"))

    def scale(name: str, rank: int) -> float:
        part, _, module = name.partition(".")
        alpha = told.get(f"{part}.alpha_pattern", {}).get(module, told.get(f"{part}.lora_alpha", rank))
        return alpha / (rank**0.5 if told.get(f"{part}.use_rslora") else rank)

    return scale


def _as_of_peft(tensors: dict[str, Tensor], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """As `unet.NAME.lora_A.weight` and so on, with the alphas of kohya's scripts in the second factor."""
    tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    for key in [key for key in tensors if key.endswith(".alpha")]:
        name, alpha = key.removesuffix(".alpha"), tensors.pop(key)
        for up, down in ((".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight")):
            if name + up in tensors and name + down in tensors:
                tensors[name + up] = tensors[name + up].float() * alpha.item() / len(tensors[name + down])
    prefixes = ("lora_unet_", "lora_te", "unet.", "text_encoder")
    tensors = {key if key.startswith(prefixes) else f"unet.{key}": tensor for key, tensor in tensors.items()}
    try:
        tensors = StableDiffusionLoraLoaderMixin.lora_state_dict(tensors, unet_config=checkpoint.unet.config)[0]
    except (ValueError, KeyError, IndexError) as error:  # names that it can't follow
        raise Unfit(f"has names that are none of Stable Diffusion's ({error})", _FAMILY) from error
    unet = {key: tensor for key, tensor in tensors.items() if key.startswith("unet.")}
    text = {key: tensor for key, tensor in tensors.items() if key not in unet}
    text = convert_state_dict_to_peft(text, original_type=StateDictType.DIFFUSERS_OLD)
    return convert_unet_state_dict_to_peft(unet) | text


def _changed(part: str, model: nn.Module, changes: Mapping[str, tuple[Tensor, Tensor]], strength: float) -> nn.Module:
    """A copy of a model with the changes in it.

    Raises:
        Unfit: modules that it hasn't, or of another shape.
    """
    own = {name.removeprefix("text_model."): weight for name, weight in model.named_parameters()}
    weights, kept = {}, {id(weight): weight for weight in (*model.parameters(), *model.buffers())}
    for name, (down, up) in changes.items():
        weight = own.get(f"{name.removeprefix('text_model.')}.weight")
        if weight is None:
            raise Unfit(f"changes {part}.{name}, which this checkpoint hasn't", _FAMILY)
        out, into = weight.flatten(1).shape
        if up.shape != (out, len(down)) or down.shape[1] != into:
            theirs, ours = f"{up.shape[0]} x {down.shape[1]}", f"{out} x {into}"
            raise Unfit(f"doesn't fit {part}.{name} ({theirs}; the checkpoint: {ours})", _FAMILY)
        weights[name] = weight, (strength * (up @ down)).view_as(weight)
    changed = {id(weight): nn.Parameter((weight.float() + change.to(weight.device)).to(weight), weight.requires_grad)
               for weight, change in weights.values()}  # fmt: skip
    return copy.deepcopy(model, kept | changed)
