"""Measure: figures of an edit beside those of its source."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import comfy.model_management
import folder_paths
from comfy_api.latest import io

from ..tav_core import TavError
from ..tav_core.clip_metrics import MINI, load_clip
from ..tav_core.measure import as_json, as_table, by_frame, load_models, mask_of, measure
from ..tav_core.visuals import frame_curves
from .common import from_images, image_of, schema
from .errors import plain_errors
from .folders import files_in, found, read_config
from .inputs import check_name, checked, usable

NONE = "none"
# the folders under models/ of what inputs choose from; newer cores have the last one, for a RAFT of torchvision too
FOLDERS = {"clip_model": "clip_vision", "lpips_model": "lpips", "raft_model": "optical_flow"}
for name in FOLDERS.values():
    folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name))


def choices(field: str = "clip_model") -> dict[str, Path | None]:
    """What an input can be, by name: none, and files of weights; a CLIP that of the mini world, or a folder of
    transformers.
    """
    roots = folder_paths.get_folder_paths(FOLDERS[field])
    if field != "clip_model":
        return {NONE: None} | files_in(roots, ".safetensors", ".pth")
    clips = {NONE: None, "mini": MINI}
    for name, folder in found(roots, "config.json"):
        if read_config(folder / "config.json").get("model_type") == "clip":
            clips.setdefault(name, folder)
    return clips


def path_of(name: str, field: str = "clip_model") -> Path | None:
    """The folder or file of a choice.

    Raises:
        TavError: it is none.
    """
    check_name(field, name)
    if name not in (known := choices(field)):
        problem = f"is not in models/{FOLDERS[field]}"
        if field == "clip_model":
            problem = "is neither mini nor a folder of a CLIP (as transformers saves it) in models/clip_vision"
        raise TavError(field, name, problem, "put it there, or choose another one")
    return known[name]


class Measure(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TAVMeasure",
            display_name="Measure (Tune-A-Video)",
            description="Figures of an edit beside the source's own: how near it is to the clip outside of what it may "
            "change, whether it moves as the clip does, flicker, and by a CLIP how well it shows its sentence.",
            search_aliases=["metrics", "psnr", "ssim", "clip score", "evaluate"],
            advanced=tuple(FOLDERS),
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
                io.Combo.Input("lpips_model", options=list(choices("lpips_model")), default=NONE, optional=True,
                               tooltip="torchvision's weights of AlexNet or SqueezeNet 1.1 in models/lpips: LPIPS "
                                       "outside of the mask. Needs the Python package lpips."),
                io.Combo.Input("raft_model", options=list(choices("raft_model")), default=NONE, optional=True,
                               tooltip="torchvision's weights of raft_large in models/optical_flow: whether the edit "
                                       "moves as the clip does, by RAFT's flow. Slow without a GPU."),
            ],
            outputs=[
                io.String.Output(display_name="table", tooltip="A line a figure, in brackets the source's own: for "
                                 "Preview Any."),
                io.String.Output(display_name="json", tooltip="The same for programs."),
                io.Image.Output(display_name="plot", tooltip="Some of the figures for each frame: where it fails."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, clip_model=None, lpips_model=None, raft_model=None) -> bool | str:
        told = (
            usable(partial(path_of, field=field), name)
            for field, name in zip(FOLDERS, (clip_model, lpips_model, raft_model))
        )
        return next((each for each in told if each is not True), True)

    @classmethod
    @checked
    def execute(
        cls, images, source, prompt, source_prompt, clip_model, mask=None, lpips_model=NONE, raft_model=NONE
    ) -> io.NodeOutput:
        with plain_errors(edited="images", clip="clip_model", lpips="lpips_model", raft="raft_model"):
            folder, lpips, raft = map(path_of, (clip_model, lpips_model, raft_model), FOLDERS)
            models = load_models(lpips=lpips, raft=raft).to(comfy.model_management.get_torch_device())
            models = replace(models, clip=folder and load_clip(folder))  # quick enough on the CPU
            if mask is not None:
                mask = mask_of(from_images(mask[..., None].expand(-1, -1, -1, 3)), len(source))
            edit, clip = from_images(images), from_images(source)
            found = measure("edit", edit, clip, prompt, source_prompt or None, mask, models)
            plot = image_of(frame_curves(by_frame(edit, clip, prompt, mask, models.clip)))
        return io.NodeOutput(as_table([found]), json.dumps(as_json(found), indent=2), plot)
