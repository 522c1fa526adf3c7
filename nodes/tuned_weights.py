"""Save, Load and Apply Tuned Weights: tune once, use it in every graph."""

from dataclasses import replace
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io
from safetensors.torch import load_file

from ..tav_core import TavError, base_fingerprint, read_tuned
from ..tav_core.errors import field
from ..tav_core.limits import LIMITS
from ..tav_core.tuned_weights import fitting, write_tuned
from .common import NodeTunedWeights, TunedWeights, schema
from .errors import plain_errors
from .folders import files_in
from .inputs import check_name, checked, new_file, usable
from .native import trainable_weights, video_unet, weights, with_tuned_weights

FOLDER = "tune_a_video"  # under models/

folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")


class SaveTunedWeights(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TAVSaveTunedWeights",
            display_name="Save Tuned Weights (Tune-A-Video)",
            description=f"Writes what One-Shot Tune learned to models/{FOLDER}, as one .safetensors file, and one more "
            "for each step that it kept.",
            search_aliases=["save tuned model"],
            is_output_node=True,
            advanced=("rank",),
            inputs=[
                NodeTunedWeights.Input("tuned_weights", tooltip="From One-Shot Tune."),
                io.String.Input("name", default="my-clip", tooltip="Name of the file; an existing one is replaced. May "
                                "hold a subfolder: skiing/first."),
                io.String.Input("prompt", default="", multiline=True,
                                tooltip="The sentence that it was tuned on, noted in the file."),
                io.Int.Input("rank", optional=True, default=0, min=0, max=LIMITS["rank"].most,
                             tooltip="A smaller file: of what the tuning changes only as much as this rank holds. 64 "
                                     "make 19 MB of the 150 of SD 1.5; 0 keeps all."),
            ],
            outputs=[],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, name=None) -> bool | str:
        return usable(new_path, name)

    @classmethod
    @checked
    def execute(cls, tuned_weights: TunedWeights, name, prompt, rank=0) -> io.NodeOutput:
        with plain_errors(output="name"), torch.no_grad():
            tuned, info = tuned_weights, replace(tuned_weights.info, prompt=prompt)
            small = dict(rank=rank, before=tuned.model and trainable_weights(tuned.model)) if rank else {}
            files = {new_path(name): (tuned.tensors, info)}
            for step, tensors in tuned.kept.items():
                path = new_path(f"{name.strip().removesuffix('.safetensors')}-{step}")
                files[path] = tensors, replace(info, config=info.config | {"steps": step})
            for path, (tensors, told) in files.items():
                write_tuned(path, tensors, told, **small)
        return io.NodeOutput(ui={"text": [f"saved {', '.join(str(path.relative_to(_root())) for path in files)}"]})


def _root() -> Path:
    return Path(folder_paths.get_folder_paths(FOLDER)[0]).resolve()


def new_path(name: str) -> Path:
    """Where weights of a name are saved.

    Raises:
        TavError: it is none, or leads out of the folder.
    """
    return new_file(_root(), name)


def choices() -> dict[str, Path]:
    """The files in models/tune_a_video, by name."""
    return files_in(folder_paths.get_folder_paths(FOLDER), ".safetensors")


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
                io.Int.Input("step", optional=True, default=0, min=0, max=100_000,
                             tooltip="Of the steps that One-Shot Tune kept, to choose from; 0 is the last one."),
            ],
            outputs=[io.Model.Output(tooltip="The tuned MODEL, for DDIM Inversion and every sampler.")],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, model, tuned_weights: TunedWeights, step=0) -> io.NodeOutput:
        with plain_errors(), torch.no_grad():
            unet, info, tensors = video_unet(model), tuned_weights.info, at_step(tuned_weights, step)
            base, before = base_fingerprint(weights(model)), trainable_weights(model)
            tensors = fitting(None, info, tensors, base, unet.inflation, before)
        return io.NodeOutput(with_tuned_weights(model, tensors, info.num_frames))


def at_step(tuned: TunedWeights, step: int) -> dict[str, torch.Tensor]:
    """The tensors of a step, 0 for the last.

    Raises:
        TavError: one that wasn't kept.
    """
    last = tuned.info.config.get("steps")
    if step in (0, last):
        return tuned.tensors
    if step not in tuned.kept:
        there = ", ".join(str(each) for each in [*tuned.kept, last])
        problem, remedy = f"wasn't kept (there are {there})", f"choose one of these, or add it to {field('keep')}"
        raise TavError("step", step, problem, remedy)
    return tuned.kept[step]
