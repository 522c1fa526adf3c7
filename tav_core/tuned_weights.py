"""Tuned weights: one safetensors file with the tuned parameters alone and what is needed to use them again.

In half precision, or, much smaller, with the change of every matrix as two factors of a low rank (see `factored`).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .atomic import atomic_path
from .attention import MODES
from .compact import factored, halved, shapes, whole
from .errors import TavError
from .inflation import NORMS, VideoUNet
from .limits import check
from .stored import Damaged, check_finite, parsed, reading
from .trainable import is_tuned, trainable_parameters
from .tuning_state import hash_tensors

FORMAT, LOW_RANK = "tune-a-video-1", "tune-a-video-low-rank-1"
_SAMPLES = 1024  # values of each parameter that go into the fingerprint


@dataclass(frozen=True)
class TunedInfo:
    """What a tuned-weights file says of itself.

    With several takes `prompt`, frames, width and height are those of the first, `more_prompts` those of the others.

    Attributes:
        base: `base_fingerprint` of the model that was tuned.
        base_name: what it is called, for people.
        num_frames, width, height: of the clip, in pixels.
        inflation: options of `inflate`.
        config: settings of the tuning, as `TuneConfig` has them.
        versions: of torch and diffusers.
        rank: of the changes in it; 0 for whole weights.
        before: fingerprint of the weights that these changes are of.
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
    rank: int = 0
    before: str = ""


def base_fingerprint(unet: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of what tuning never changes: names, shapes and up to 1024 even samples of each parameter.

    The same for a 2D U-Net, for the inflated one before and after tuning, and in fp16 or fp32. A `norm_temp` that isn't
    as `inflate` makes it counts: tuned weights don't carry it.

    Args:
        unet: a U-Net, or its parameters by name.
    """
    parameters = dict(unet.named_parameters()) if isinstance(unet, nn.Module) else unet

    def fresh_norm(name: str) -> bool:
        return "norm_temp." in name and bool((parameters[name] == (1 if name.endswith("weight") else 0)).all())

    return _fingerprint({n: p for n, p in parameters.items() if not is_tuned(n) and not fresh_norm(n)})


def _fingerprint(parameters: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
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
    rank: int | None = None,
    before: Mapping[str, Tensor] | None = None,
):
    """Writes the tuned parameters alone (see `trainable_parameters`), and what is needed to use them again: whole or
    not at all, in float16 but for a parameter that it can't hold.

    Args:
        path: a .safetensors file; one that is there is replaced.
        unet: tuned, from `tune_on` or `tune`.
        prompt, num_frames, width, height: of the clip that it was tuned on, in pixels; with several, of the first.
        config: the settings, as `dataclasses.asdict(preset.tuning)` has them; they are noted for people alone.
        base_name: of the checkpoint, for people; what tells the base model is its `base_fingerprint`.
        more_prompts: those of further clips.
        rank: 1 ... 1280; keep of the change of every matrix what a product of this rank holds, where that is smaller.
        before: with a rank, the `trainable_parameters` as they were before the tuning: those of a U-Net that was
            inflated alike.

    Raises:
        TavError: the U-Net isn't inflated, a rank of no change, or the file can't be written.
    """
    require_inflated(unet)
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
    write_tuned(path, trainable_parameters(unet), info, rank=rank, before=before)


def tuned_info(base: str, inflation: dict[str, Any], **facts) -> TunedInfo:
    """What there is to say of weights tuned just now; `facts` are the other fields of `TunedInfo`."""
    return TunedInfo(
        base=base,
        inflation=inflation,
        versions={"torch": torch.__version__, "diffusers": diffusers.__version__},
        **facts,
    )


def write_tuned(
    path: str | Path,
    weights: Mapping[str, Tensor],
    info: TunedInfo,
    *,
    rank: int | None = None,
    before: Mapping[str, Tensor] | None = None,
):
    """Writes tuned weights that are at hand without their U-Net, whole or as they came from a file of low rank; see
    `save_tuned`.
    """
    if rank is None:
        tensors = halved(weights)
    else:
        check(rank=rank)
        if before is None:
            problem = "is of what the tuning changed, and nothing tells the weights before it"
            raise TavError("rank", rank, problem, "leave it out, or save right after the tuning")
        tensors, info = factored(weights, before, rank), replace(info, rank=rank, before=_fingerprint(before))
    metadata = {"format": LOW_RANK if info.rank else FORMAT}
    metadata |= {name: json.dumps(value) for name, value in info.__dict__.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata)


def read_tuned(path: str | Path) -> TunedInfo:
    """The metadata of a tuned-weights file; its tensors are not read.

    Raises:
        TavError: missing, unreadable, damaged, or not such a file.
    """
    kinds, remedy = (FORMAT, LOW_RANK), "give a .safetensors file made by tune"
    with reading(path, "tuned", kinds, "tuned weights", remedy) as file:
        # old files don't have them
        metadata = {"more_prompts": "[]", "rank": "0", "before": '""', **file.metadata()}
        told = parsed(metadata, {name: get_origin(kind) or kind for name, kind in get_type_hints(TunedInfo).items()})
        for name in ("num_frames", "width", "height"):
            if not 0 < told[name] < 2**16:
                raise Damaged(f"{name} is {told[name]}")
        if (told["rank"] > 0) != (metadata["format"] == LOW_RANK):
            raise Damaged(f"rank is {told['rank']}")
        if not all(isinstance(prompt, str) for prompt in told["more_prompts"]):
            raise Damaged("more_prompts are no texts")
        attention, causal, norm = (told["inflation"][name] for name in ("attention", "temporal_causal", "norm"))
        if len(told["inflation"]) != 3 or attention not in MODES or norm not in NORMS or type(causal) is not bool:
            raise Damaged("it is inflated in no way that is known")
    return TunedInfo(**told)


def load_tuned(path: str | Path, unet: VideoUNet) -> TunedInfo:
    """Loads tuned weights into an inflated U-Net, in place.

    Args:
        unet: of the same base model, inflated with the options that `read_tuned` tells; for a file of low rank untuned.

    Returns: what the file says of itself.

    Raises:
        TavError: not a tuned-weights file, another base model, or a U-Net that is inflated otherwise or not at all.
    """
    info = read_tuned(path)
    require_inflated(unet)
    parameters = trainable_parameters(unet)
    weights = fitting(path, info, load_file(path), base_fingerprint(unet), unet.inflation, parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return info


def fitting(
    path: str | Path | None,
    info: TunedInfo,
    tensors: Mapping[str, Tensor],
    base: str,
    inflation: dict[str, Any],
    parameters: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The whole weights of tuned ones, for the model that they were made on.

    Args:
        path: of their file, or None if they are in none.
        base, inflation, parameters: fingerprint, options and trainable parameters of the model at hand, untuned if the
            file is of low rank.

    Raises:
        TavError: another base model, another inflation, other parameters, or what is no weight.
    """
    if info.base != base:
        problem = f"belongs to the base model {info.base_name!r} ({info.base[:12]}), this one is {base[:12]}"
        raise TavError("tuned", path, problem, "load that checkpoint, or tune on this one")
    if info.inflation != inflation:
        problem = f"was made with {info.inflation}, the U-Net is inflated with {inflation}"
        raise TavError("tuned", path, problem, "inflate it the same way")
    if info.rank and info.before != _fingerprint(parameters):
        problem = "holds changes of other weights than those of this model, which is tuned or adapted otherwise"
        raise TavError("tuned", path, problem, "use it on what was tuned, as it was then")
    if shapes(tensors) != {n: p.shape for n, p in parameters.items()}:
        raise TavError("tuned", path, "does not name the parameters of this U-Net: it is damaged", "tune again")
    try:
        check_finite(tensors)
    except Damaged as error:
        raise TavError("tuned", path, f"is damaged ({error})", "tune again") from error
    return whole(tensors, parameters)


def require_inflated(unet: nn.Module):
    """Raises a TavError for a U-Net that isn't inflated."""
    if not isinstance(unet, VideoUNet):
        raise TavError(
            "unet", None, f"is a {type(unet).__name__}", "inflate it first: only a video U-Net has tuned weights"
        )
