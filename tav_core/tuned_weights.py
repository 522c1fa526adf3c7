"""Tuned weights: one safetensors file with the tuned parameters alone and what is needed to use them again."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .atomic import atomic_path
from .attention import MODES
from .errors import TavError
from .inflation import NORMS, VideoUNet
from .stored import Damaged, check_finite, parsed, reading
from .trainable import is_tuned, trainable_parameters
from .tuning_state import hash_tensors

FORMAT = "tune-a-video-1"
_SAMPLES = 1024  # values of each parameter that go into the fingerprint


@dataclass(frozen=True)
class TunedInfo:
    """What a tuned-weights file says of itself; width and height in pixels.

    With several takes `prompt`, frames, width and height are those of the first, `more_prompts` those of the others.
    """

    base: str
    base_name: str
    prompt: str
    num_frames: int
    width: int
    height: int
    inflation: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, str]
    more_prompts: list[str] = field(default_factory=list)


def base_fingerprint(unet: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of what tuning never changes: names, shapes and up to 1024 even samples of each parameter.

    The same for a 2D U-Net, for the inflated one before and after tuning, and in fp16 or fp32. A `norm_temp` that isn't
    as `inflate` makes it counts: tuned weights don't carry it.

    Args:
        unet: a U-Net, or its parameters by name.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted((dict(unet.named_parameters()) if isinstance(unet, nn.Module) else unet).items()):
        fresh_norm = "norm_temp." in name and bool((parameter == (1 if name.endswith("weight") else 0)).all())
        if fresh_norm or is_tuned(name):
            continue
        values = parameter.detach().flatten()
        n = len(values)
        places = torch.arange(min(n, _SAMPLES)) * (n - 1) // max(1, min(n, _SAMPLES) - 1)  # first and last included
        values = values[places.to(values.device)].half().float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)};".encode())
        digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of tuned weights in the order of their names, as float32: it tells one tuning from another."""
    return hash_tensors(weights[name].float() for name in sorted(weights))


def save_tuned(
    path: str | Path,
    unet: VideoUNet,
    *,
    prompt: str,
    num_frames: int,
    width: int,
    height: int,
    config: dict[str, Any],
    base_name: str = "",
    more_prompts: Sequence[str] = (),
):
    """Writes the tuned parameters (float32) and their metadata atomically.

    Raises:
        TavError: the U-Net isn't inflated, or the file can't be written.
    """
    _require_inflated(unet)
    info = tuned_info(
        base_fingerprint(unet),
        unet.inflation,
        prompt=prompt,
        num_frames=num_frames,
        width=width,
        height=height,
        config=config,
        base_name=base_name,
        more_prompts=list(more_prompts),
    )
    write_tuned(path, trainable_parameters(unet), info)


def tuned_info(base: str, inflation: dict[str, Any], **facts) -> TunedInfo:
    """What there is to say of weights tuned just now; `facts` are the other fields of `TunedInfo`."""
    return TunedInfo(
        base=base,
        inflation=inflation,
        versions={"torch": torch.__version__, "diffusers": diffusers.__version__},
        **facts,
    )


def write_tuned(path: str | Path, weights: Mapping[str, Tensor], info: TunedInfo):
    """Writes tuned weights that are at hand without their U-Net; see `save_tuned`."""
    metadata = {"format": FORMAT, **{name: json.dumps(value) for name, value in info.__dict__.items()}}
    tensors = {name: weight.detach().float().cpu().contiguous() for name, weight in weights.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata)


def read_tuned(path: str | Path) -> TunedInfo:
    """The metadata of a tuned-weights file.

    Raises:
        TavError: missing, unreadable, damaged, or not such a file.
    """
    with reading(path, "tuned", FORMAT, "tuned weights", "give a .safetensors file made by tune") as file:
        metadata = {"more_prompts": "[]", **file.metadata()}  # files of one take may not have it
        told = parsed(metadata, {name: get_origin(kind) or kind for name, kind in get_type_hints(TunedInfo).items()})
        for name in ("num_frames", "width", "height"):
            if not 0 < told[name] < 2**16:
                raise Damaged(f"{name} is {told[name]}")
        if not all(isinstance(prompt, str) for prompt in told["more_prompts"]):
            raise Damaged("more_prompts are no texts")
        attention, causal, norm = (told["inflation"][name] for name in ("attention", "temporal_causal", "norm"))
        if len(told["inflation"]) != 3 or attention not in MODES or norm not in NORMS or type(causal) is not bool:
            raise Damaged("it is inflated in no way that is known")
    return TunedInfo(**told)


def load_tuned(path: str | Path, unet: VideoUNet) -> TunedInfo:
    """Loads tuned weights into an inflated U-Net, in place.

    Raises:
        TavError: not a tuned-weights file, another base model, or a U-Net that is inflated otherwise or not at all.
    """
    info = read_tuned(path)
    _require_inflated(unet)
    parameters, tensors = trainable_parameters(unet), load_file(path)
    check_fit(path, info, tensors, base_fingerprint(unet), unet.inflation, parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return info


def check_fit(
    path: str | Path | None,
    info: TunedInfo,
    weights: Mapping[str, Tensor],
    base: str,
    inflation: dict[str, Any],
    parameters: Mapping[str, Tensor],
):
    """Refuses tuned weights that were made on another model.

    Args:
        path: of the file of the weights, or None if they are in none.
        base, inflation, parameters: fingerprint, options and trainable parameters of the model at hand.

    Raises:
        TavError: another base model, another inflation, other parameters, or what is no weight.
    """
    if info.base != base:
        problem = f"belongs to the base model {info.base_name!r} ({info.base[:12]}), this one is {base[:12]}"
        raise TavError("tuned", path, problem, "load that checkpoint, or tune on this one")
    if info.inflation != inflation:
        problem = f"was made with {info.inflation}, the U-Net is inflated with {inflation}"
        raise TavError("tuned", path, problem, "inflate it the same way")
    if {n: t.shape for n, t in weights.items()} != {n: p.shape for n, p in parameters.items()}:
        raise TavError("tuned", path, "does not name the parameters of this U-Net: it is damaged", "tune again")
    try:
        check_finite(weights)
    except Damaged as error:
        raise TavError("tuned", path, f"is damaged ({error})", "tune again") from error


def _require_inflated(unet: nn.Module):
    if not isinstance(unet, VideoUNet):
        raise TavError(
            "unet", None, f"is a {type(unet).__name__}", "inflate it first: only a video U-Net has tuned weights"
        )
