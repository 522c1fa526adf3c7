"""LoRAs (Hu et al., arXiv 2106.09685) and their kin: small changes of a checkpoint's weights, made part of them.

Files of kohya's scripts and LyCORIS, of ComfyUI, of diffusers in its old and its present form, and of peft are read.
What the kinds compute is in `adapters`, how files name modules in `lora_names`.
"""

import copy
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .adapters import KINDS, MAGNITUDES, Factors, Scale, change
from .checkpoint import Checkpoint, reading
from .checkpoint_parts import Unfit
from .errors import TavError
from .inflation import VideoUNet
from .limits import check
from .lora_names import as_of_peft, flat_names
from .stored import Damaged, check_finite
from .tuning_state import hash_tensors

_OTHERS = {"boft_": "BOFT", "oft_": "OFT", "on_input": "(IA)3", "ia3_": "(IA)3", "a1.weight": "GLoRA"}  # by their marks
_NAMES = {"lora_A": "lora_down", "lora_B": "lora_up", "w_norm": "diff", "b_norm": "diff_b"}  # of factors
_KNOWN = {"alpha", "diff_b", *MAGNITUDES, *(name for _, names in KINDS.values() for name in names)}
_KIN = "give a LoRA, LoHa, LoKr or DoRA, or a checkpoint that it was merged into"
_OF_COMFYUI = ("diffusion_model.", "text_encoders.")  # names of its own node that saves LoRAs
_FAMILY = "give one that was made for checkpoints of this family"


class Adapter(NamedTuple):
    """Of one weight: the factors of what it adds, and alpha / rank."""

    factors: Factors
    scale: Scale


def load_lora(checkpoint: Checkpoint, path: str | Path, strength: float = 1.0) -> Checkpoint:
    """The checkpoint with a LoRA in the weights of its U-Net (which may be inflated) and its text encoder.

    A plain LoRA makes W + strength alpha / rank (up down) of every matrix W that the file names. LoHa, LoKr, LoCon,
    DoRA and whole differences (of biases as well) are taken likewise, and become what they become in ComfyUI; of a DoRA
    the strength is the share of the way from W to what it makes of W. The given checkpoint stays as it is; weights that
    don't change are shared with it.

    Args:
        path: a .safetensors file of kohya's scripts, LyCORIS, ComfyUI, diffusers or peft.
        strength: -10 ... 10; 1 is as it was trained.

    Raises:
        TavError: missing or damaged files, a pickle, another kind of adapter (OFT, BOFT, GLoRA, (IA)3), one that names
            what the checkpoint hasn't (SDXL, other families), a strength out of range.
    """
    weights, digest = _fitting(checkpoint, path, strength)
    parts = {part: _changed(getattr(checkpoint, part), of, strength) for part, of in weights.items()}
    told = f"{Path(path).stem}:{strength:g}"
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
    with _of_edits():
        for path, strength in loras:
            styled = load_lora(styled, path, strength)
    return styled, styled.unet


def check_loras(checkpoint: Checkpoint, loras: Sequence[tuple[str | Path, float]]):
    """Raises what `with_loras` would, at once: no weight is computed."""
    with _of_edits():
        for path, strength in loras:
            _fitting(checkpoint, path, strength)


@contextmanager
def _of_edits() -> Iterator[None]:
    try:
        yield
    except TavError as error:
        raise TavError("edit_lora", error.value, error.problem, error.remedy) from error


def _fitting(
    checkpoint: Checkpoint, path: str | Path, strength: float
) -> tuple[dict[str, list[tuple[nn.Parameter, Adapter]]], str]:
    """The weights of each part of a checkpoint with what a file has for them, and the file's fingerprint.

    Raises:
        TavError: see `load_lora`.
    """
    check(lora_strength=strength)
    with reading("lora", path):
        metadata, tensors = _read(Path(path))
        adapters = _adapters(metadata, tensors, checkpoint)
        weights = {part: _weights(part, getattr(checkpoint, part), of) for part, of in adapters.items()}
    alphas = torch.tensor(list(metadata.get("lora_adapter_metadata", "").encode()))
    return weights, hash_tensors([*(tensors[key] for key in sorted(tensors)), alphas])


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a file, all of them finite."""
    if path.suffix.lower() != ".safetensors":
        raise Unfit("is not a .safetensors file, and a pickle can run code", "convert it first")
    if not path.is_file():
        raise Unfit("is no file" if path.exists() else "does not exist", "give a .safetensors file of a LoRA")
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    for key in tensors:
        if kind := next((kind for mark, kind in _OTHERS.items() if mark in key), None):
            raise Unfit(f"is a {kind} (it has {key})", _KIN)
    try:
        check_finite(tensors)
    except Damaged as error:
        raise Unfit(f"is damaged ({error})", "download it again") from error
    return metadata, tensors


def _adapters(
    metadata: Mapping[str, str], tensors: dict[str, Tensor], checkpoint: Checkpoint
) -> dict[str, dict[str, Adapter]]:
    """By the part of a `Checkpoint` and the name of its weight.

    Raises:
        Unfit: names of other models, or what is of no adapter.
    """
    names, factors, alphas = flat_names(checkpoint.unet, checkpoint.text_encoder), defaultdict(dict), {}
    flat = {key: tensor for key, tensor in tensors.items() if key.startswith(("lora_", "lycoris_", *_OF_COMFYUI))}
    dotted = as_of_peft({key: tensor for key, tensor in tensors.items() if key not in flat})
    for key, tensor in (flat | dotted).items():
        name, _, factor = key.removesuffix(".weight").rpartition(".")
        factor = _NAMES.get(factor, factor)
        if factor not in _KNOWN:
            raise Unfit(f"holds what is no LoRA's ({key})", _KIN)
        if name.startswith(("lora_te2_", "text_encoder_2.", "text_encoders.clip_g.")):
            raise Unfit("is for SDXL (it changes a second text encoder)", _FAMILY)
        name = names.get(name, name)
        if not name.startswith(("unet.", "text_encoder.")):
            raise Unfit(f"changes {name}, which this checkpoint hasn't", _FAMILY)
        if factor == "alpha":
            alphas[name] = tensor.item()
        elif factor == "diff_b":
            factors[f"{name}.bias"]["diff"] = tensor.float()
        else:
            factors[f"{name}.weight"][factor] = tensor.float()
    if not factors:
        raise Unfit("holds nothing", "give a .safetensors file of a LoRA")
    told, adapters = json.loads(metadata.get("lora_adapter_metadata", "{}")), defaultdict(dict)
    for name, of in factors.items():
        module, (part, _, weight) = name.rpartition(".")[0], name.partition(".")
        if len(kinds := [kind for kind, (_, names) in KINDS.items() if of.keys() & set(names)]) != 1:
            raise Unfit(f"has {' and '.join(kinds) or 'no factors'} for {name}", "give another file")
        adapters[part][weight.removeprefix("text_model.")] = Adapter(
            of, partial(_scale, told, module, alphas.get(module))
        )
    return adapters


def _scale(told: Mapping, module: str, alpha: float | None, rank: int) -> float:
    """Alpha / rank of a module; where its alpha isn't among the tensors, by what diffusers noted in the metadata."""
    if alpha is not None:
        return alpha / rank
    part, _, name = module.partition(".")
    alpha = told.get(f"{part}.alpha_pattern", {}).get(name, told.get(f"{part}.lora_alpha", rank))
    return alpha / (rank**0.5 if told.get(f"{part}.use_rslora") else rank)


def _weights(part: str, model: nn.Module, adapters: Mapping[str, Adapter]) -> list[tuple[nn.Parameter, Adapter]]:
    """The weights of a model that adapters are for; nothing is computed yet.

    Raises:
        Unfit: weights that it hasn't, or of another shape.
    """
    own = {name.removeprefix("text_model."): weight for name, weight in model.named_parameters()}
    found = []
    for name, adapter in adapters.items():
        if (weight := own.get(name)) is None:
            raise Unfit(f"changes {part}.{name}, which this checkpoint hasn't", _FAMILY)
        try:
            shapes = {factor: tensor.to("meta") for factor, tensor in adapter.factors.items()}
            change(weight.to("meta", torch.float32), shapes, adapter.scale)
        except KeyError as error:
            raise Unfit(f"lacks {error.args[0]} of {part}.{name}", "download it again") from None
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise Unfit(f"doesn't fit {part}.{name} ({error})", _FAMILY) from None
        found.append((weight, adapter))
    return found


@torch.no_grad()
def _changed(model: nn.Module, weights: Sequence[tuple[nn.Parameter, Adapter]], strength: float) -> nn.Module:
    """A copy of a model with the adapters in it."""
    kept, changed = {id(weight): weight for weight in (*model.parameters(), *model.buffers())}, {}
    for weight, (factors, scale) in weights:
        whole = weight.float()
        added = change(whole, {name: x.to(weight.device) for name, x in factors.items()}, scale)
        changed[id(weight)] = nn.Parameter((whole + strength * added).to(weight), weight.requires_grad)
    return copy.deepcopy(model, kept | changed)
