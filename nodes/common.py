"""What the nodes share: schemas that fit every core, and the conversions of their types."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import comfy.utils
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui
from einops import rearrange
from PIL import Image
from torch import Tensor

from ..tav_core import TavError, TunedInfo
from .native import check_context, video_unet

CATEGORY = "Tune-A-Video"
NodeTakes = io.Custom("TAV_TAKES")
NodeTunedWeights = io.Custom("TAV_TUNED_WEIGHTS")

_LIMITS = {"area": "an area", "mask": "a mask", "gligen": "boxes of GLIGEN", "hooks": "a hook"}  # of a CONDITIONING


@dataclasses.dataclass(frozen=True)
class TunedWeights:
    """What One-Shot Tune learned.

    Attributes:
        tensors: by the name of their parameter, as a file holds them: some may be factors (see `factored`).
        info: what they belong to.
        kept: those of earlier steps, by step.
        model: the MODEL that was tuned; None if they come from a file.
    """

    tensors: dict[str, Tensor]
    info: TunedInfo
    kept: dict[int, dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    model: ModelPatcher | None = None


def schema(advanced: tuple[str, ...] = (), **fields) -> io.Schema:
    """An `io.Schema`, without the fields that this version of ComfyUI doesn't know.

    Inputs that have no other display name get one like "Learning rate".

    Args:
        advanced: inputs that a beginner doesn't need; newer frontends show them on demand.
    """
    known = {field.name for field in dataclasses.fields(io.Schema)}
    assert set(advanced) <= {each.id for each in fields["inputs"]}, advanced
    for each in fields["inputs"]:
        each.display_name = each.display_name or each.id.replace("_", " ").capitalize()
        if hasattr(each, "advanced"):
            each.advanced = each.id in advanced or None
    return io.Schema(**{name: value for name, value in fields.items() if name in known}, category=CATEGORY)


def inside(folder: str | Path, name: str, field: str, linked: bool = False) -> Path:
    """The path of a name given in a graph, in an input called `field`.

    Args:
        linked: whether an entry of the folder may be a link to elsewhere: a graph can't make one, so its user did.

    Raises:
        TavError: it leads out of the folder, or of what the link leads to.
    """
    try:
        folder = Path(folder).resolve()
        path = (folder / name).resolve()
        home, plain = folder, Path(os.path.normpath(name))
        if linked and not plain.anchor and plain.parts and plain.parts[0] != "..":
            home, path = (folder / plain.parts[0]).resolve(), (folder / plain).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, null bytes
        raise TavError(field, name, f"can't be followed ({error})", "choose another one") from error
    if not path.is_relative_to(home):
        raise TavError(field, name, f"leads out of {folder.name}", "give a name inside of it")
    return path


def clean_latents(model: ModelPatcher, latent: dict[str, Any]) -> Tensor:
    """The frames of a LATENT as the model sees them, `1 c f h w` float32, in the scale of its noise.

    Raises:
        TavError: a latent with other channels, or of a video model.
    """
    samples = latent["samples"]
    channels = video_unet(model).config.in_channels
    if samples.ndim != 4 or samples.shape[1] != channels:
        problem = f"has shape {tuple(samples.shape)}"
        raise TavError("LATENT", None, problem, f"give frames as a batch, (frames, {channels}, height, width)")
    latents = model.model.process_latent_in(samples.float())
    return rearrange(latents, "f c h w -> 1 c f h w")


def hidden_states(model: ModelPatcher, conditioning: list, field: str = "positive") -> Tensor:
    """The text embedding of a CONDITIONING, `1 n d` or `f n d`.

    Raises:
        TavError: several prompts combined, or the CLIP of another family.
    """
    if len(conditioning) != 1:
        raise TavError(field, None, f"holds {len(conditioning)} prompts", "give one, from CLIP Text Encode")
    check_context(video_unet(model), conditioning[0][0])
    return conditioning[0][0].float()


def check_unlimited(conditioning: list, field: str):
    """Raises a TavError for a CONDITIONING of one sentence that isn't for all of a clip, in every step."""
    told = conditioning[0][1]
    limits = [word for key, word in _LIMITS.items() if told.get(key) is not None]
    if told.get("start_percent", 0) > 0 or told.get("end_percent", 1) < 1:
        limits.append("a range of steps")
    if limits:
        problem = f"has {limits[0]}, but is for all of the clip and every step"
        raise TavError(field, None, problem, "give it as CLIP Text Encode makes it")


def to_images(frames: Tensor) -> Tensor:
    """uint8 `f h w c` to IMAGE, float32 in 0..1."""
    return frames.float() / 255


def from_images(images: Tensor) -> Tensor:
    """IMAGE, with or without alpha, to uint8 `f h w 3`."""
    return (images[..., :3] * 255).round().clamp(0, 255).to(torch.uint8).cpu()


def image_of(picture: Image.Image) -> Tensor:
    """A PIL picture as an IMAGE of one."""
    return to_images(torch.from_numpy(np.array(picture.convert("RGB")))[None])


def report(node: type[io.ComfyNode], text: str):
    """Shows a line of text in the node that is running, where the core can."""
    from server import PromptServer

    if hasattr(PromptServer.instance, "send_progress_text"):
        PromptServer.instance.send_progress_text(text, node.hidden.unique_id)


def show(node: type[io.ComfyNode], picture: Image.Image):
    """Shows a picture in the node that is running, until another one or the node's own comes.

    As a part of its output: what ComfyUI calls a preview would stay for good, in front of the node's own or beside it.
    """
    from server import PromptServer

    server, id_ = PromptServer.instance, node.hidden.unique_id
    if server.client_id is not None:
        output = ui.PreviewImage(image_of(picture), cls=node).as_dict()
        told = {"node": id_, "display_node": id_, "output": output, "prompt_id": server.last_prompt_id}
        server.send_sync("executed", told, server.client_id)


def progress_bar(total: int) -> comfy.utils.ProgressBar:
    return comfy.utils.ProgressBar(total)
