"""Save, Load and Apply Tuned Weights: tune once, use it in every graph."""

import os
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io
from safetensors.torch import load_file

from ..tav_core import TavError, base_fingerprint, read_tuned
from ..tav_core.tuned_weights import check_fit, write_tuned
from .common import NodeTunedWeights, TunedWeights, inside, schema
from .errors import plain_errors
from .folders import walked
from .inputs import check_name, check_new_name, checked, usable
from .native import trainable_names, video_unet, weights, with_tuned_weights

FOLDER = "tune_a_video"  # under models/

folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")


class SaveTunedWeights(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TAVSaveTunedWeights",
            display_name="Save Tuned Weights (Tune-A-Video)",
            description=f"Writes what One-Shot Tune learned to models/{FOLDER}, as one .safetensors file.",
            search_aliases=["save tuned model"],
            is_output_node=True,
            inputs=[
                NodeTunedWeights.Input("tuned_weights", tooltip="From One-Shot Tune."),
                io.String.Input("name", default="my-clip", tooltip="Name of the file; an existing one is replaced. May "
                                "hold a subfolder: skiing/first."),
                io.String.Input("prompt", default="", multiline=True,
                                tooltip="The sentence that it was tuned on, noted in the file."),
            ],
            outputs=[],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, name=None) -> bool | str:
        return usable(new_path, name)

    @classmethod
    @checked
    def execute(cls, tuned_weights: TunedWeights, name, prompt) -> io.NodeOutput:
        with plain_errors(output="name"):
            path = new_path(name)
            info = type(tuned_weights.info)(**{**tuned_weights.info.__dict__, "prompt": prompt})
            write_tuned(path, tuned_weights.tensors, info)
        return io.NodeOutput(ui={"text": [f"saved {path.relative_to(_root())}"]})


def _root() -> Path:
    return Path(folder_paths.get_folder_paths(FOLDER)[0]).resolve()


def new_path(name: str) -> Path:
    """Where weights of a name are saved.

    Raises:
        TavError: it is none, or leads out of the folder.
    """
    check_name("name", name)
    plain = name.strip().removesuffix(".safetensors").replace("\\", "/")
    if not plain:
        raise TavError("name", None, "is empty", "give the file a name")
    path = inside(_root(), f"{plain}.safetensors", "name")
    check_new_name("name", plain)
    return path


def choices() -> dict[str, Path]:
    """The files in models/tune_a_video, by name."""
    files = {}
    for root in folder_paths.get_folder_paths(FOLDER):
        for folder, names in walked(root):
            paths = [folder / name for name in names if name.lower().endswith(".safetensors")]
            files = {**{os.path.relpath(path, root): path for path in paths}, **files}
    return dict(sorted(files.items()))


def path_of(file: str) -> Path:
    """The path of a choice.

    Raises:
        TavError: it is none.
    """
    check_name("file", file)
    if (path := choices().get(file)) is None:
        raise TavError("file", file, f"is not in models/{FOLDER}", "put it there, or choose another one")
    return path


class LoadTunedWeights(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TAVLoadTunedWeights",
            display_name="Load Tuned Weights (Tune-A-Video)",
            description=f"Loads a file that Save Tuned Weights or the command line wrote, from models/{FOLDER}.",
            search_aliases=["load tuned model"],
            inputs=[
                io.Combo.Input("file", options=list(choices()),
                               tooltip=f"A file in models/{FOLDER}."),
            ],
            outputs=[
                NodeTunedWeights.Output(display_name="tuned_weights", tooltip="For Apply Tuned Weights."),
                io.String.Output(display_name="prompt", tooltip="The sentence that they were tuned on."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, file=None) -> bool | str:
        return usable(path_of, file)

    @classmethod
    def fingerprint_inputs(cls, file):
        return path_of(file).stat().st_mtime_ns

    @classmethod
    @checked
    def execute(cls, file) -> io.NodeOutput:
        with plain_errors(tuned="file"):
            path = path_of(file)
            info = read_tuned(path)
            return io.NodeOutput(TunedWeights(load_file(path), info), info.prompt)


class ApplyTunedWeights(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TAVApplyTunedWeights",
            display_name="Apply Tuned Weights (Tune-A-Video)",
            description="Gives an inflated MODEL what was tuned before: no tuning needed. It must be the same "
            "checkpoint, with the same LoRAs, inflated the same way.",
            search_aliases=["use tuned model"],
            inputs=[
                io.Model.Input("model", tooltip="From Inflate."),
                NodeTunedWeights.Input("tuned_weights", tooltip="From Load Tuned Weights."),
            ],
            outputs=[io.Model.Output(tooltip="The tuned MODEL, for DDIM Inversion and every sampler.")],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, model, tuned_weights: TunedWeights) -> io.NodeOutput:
        with plain_errors(), torch.no_grad():
            unet, info = video_unet(model), tuned_weights.info
            base = base_fingerprint(weights(model))
            check_fit(None, info, tuned_weights.tensors, base, unet.inflation, trainable_names(model))
        return io.NodeOutput(with_tuned_weights(model, tuned_weights.tensors, info.num_frames))
