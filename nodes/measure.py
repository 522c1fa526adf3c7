"""Measure: figures of an edit beside those of its source."""

import json
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..tav_core import TavError
from ..tav_core.clip_metrics import MINI, load_clip
from ..tav_core.measure import Models, as_json, as_table, by_frame, mask_of, measure
from ..tav_core.visuals import frame_curves
from .common import from_images, image_of, schema
from .errors import plain_errors
from .folders import found, read_config
from .inputs import check_name, checked, usable

NONE = "none"


def choices() -> dict[str, Path | None]:
    """CLIPs by name: none, that of the mini world, and folders of transformers in models/clip_vision."""
    clips = {NONE: None, "mini": MINI}
    for name, folder in found(folder_paths.get_folder_paths("clip_vision"), "config.json"):
        if read_config(folder / "config.json").get("model_type") == "clip":
            clips.setdefault(name, folder)
    return clips


def path_of(clip_model: str) -> Path | None:
    """The folder of a choice.

    Raises:
        TavError: it is none.
    """
    check_name("clip_model", clip_model)
    if clip_model not in (clips := choices()):
        problem = "is neither mini nor a folder of a CLIP (as transformers saves it) in models/clip_vision"
        raise TavError("clip_model", clip_model, problem, "put it there, or choose another one")
    return clips[clip_model]


class Measure(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TAVMeasure",
            display_name="Measure (Tune-A-Video)",
            description="Figures of an edit beside the source's own: how near it is to the clip outside of what it may "
            "change, whether it moves as the clip does, flicker, and by a CLIP how well it shows its sentence.",
            search_aliases=["metrics", "psnr", "ssim", "clip score", "evaluate"],
            advanced=("clip_model",),
            inputs=[
                io.Image.Input("images", tooltip="The edit."),
                io.Image.Input("source", tooltip="The clip, from Load Video: the frames that were encoded."),
                io.String.Input("prompt", multiline=True, default="", tooltip="What the edit should show."),
                io.String.Input("source_prompt", multiline=True, default="", tooltip="What the clip shows."),
                io.Combo.Input("clip_model", options=list(choices()), default=NONE,
                               tooltip="A folder of a CLIP in models/clip_vision, or that of the mini world. none "
                                       "leaves its figures out."),
                io.Mask.Input("mask", optional=True, tooltip="White where the edit may change something: fidelity is "
                              "measured outside of it. Invert it for an edit of the background."),
            ],
            outputs=[
                io.String.Output(display_name="table", tooltip="A line a figure, in brackets the source's own: for "
                                 "Preview Any."),
                io.String.Output(display_name="json", tooltip="The same for programs."),
                io.Image.Output(display_name="plot", tooltip="Some of the figures for each frame: where it fails."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, clip_model=None) -> bool | str:
        return usable(path_of, clip_model)

    @classmethod
    @checked
    def execute(cls, images, source, prompt, source_prompt, clip_model, mask=None) -> io.NodeOutput:
        with plain_errors(edited="images", clip="clip_model"):
            folder = path_of(clip_model)
            models = Models(None if folder is None else load_clip(folder))
            if mask is not None:
                mask = mask_of(from_images(mask[..., None].expand(-1, -1, -1, 3)), len(source))
            edit, clip = from_images(images), from_images(source)
            found = measure("edit", edit, clip, prompt, source_prompt or None, mask, models)
            plot = image_of(frame_curves(by_frame(edit, clip, prompt, mask, models.clip)))
        return io.NodeOutput(as_table([found]), json.dumps(as_json(found), indent=2), plot)
