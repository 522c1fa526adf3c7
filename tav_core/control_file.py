"""ControlNets in a single .safetensors file, under the names of the original ControlNet code or of diffusers."""

import inspect
import json
from pathlib import Path

import torch
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from safetensors import safe_open

from .checkpoint_parts import CONFIGS, Unfit, lacking, refuse_quantised

_PREFIX = "control_model."  # in most files
_OTHERS = {  # what else there is, by what a name begins with; the first that is found tells
    "lora_controlnet": "a Control-LoRA, which needs the weights of a checkpoint beside it",
    "difference": "the difference of a ControlNet to a checkpoint, which is none alone",
    "control_add_embedding.": "a union ControlNet of SDXL",
    "task_embedding": "a union ControlNet of SDXL",
    "add_embedding.": "a ControlNet of SDXL",
    "label_emb.": "a ControlNet of SDXL",
    "adapter.": "a T2I-Adapter",
    "body.": "a T2I-Adapter",
    "image_proj.": "an IP-Adapter",
    "transformer_blocks.": "a ControlNet of a transformer model such as SD3 or Flux",
    "double_blocks.": "a ControlNet of a transformer model such as SD3 or Flux",
}
_REMEDY = "give a ControlNet for SD 1.x or 2.x"
_FAMILIES = {768: "sd1", 1024: "sd2"}  # by the width of the text


def load_control_file(path: Path, config: str | Path | None) -> ControlNetModel:
    """Arguments are those of `load_controlnet`.

    Raises:
        Unfit: a pickle, another kind of model, or one with weights that would be lost.
    """
    if path.suffix.lower() != ".safetensors":
        raise Unfit("is not a .safetensors file, and a pickle can run code", "convert it first")
    with safe_open(path, "pt") as file:
        own = any(name.startswith(_PREFIX) for name in file.keys())  # a file may hold its checkpoint as well
        names = {name.removeprefix(_PREFIX): name for name in file.keys() if not own or name.startswith(_PREFIX)}
        width = _check_kind({name: file.get_slice(full).get_shape() for name, full in names.items()})
        tensors = {name: file.get_tensor(full) for name, full in names.items()}
    refuse_quantised(tensors)
    if config is None and width not in _FAMILIES:
        raise Unfit(f"takes text of width {width}, which is neither SD 1.x nor 2.x", _REMEDY)
    model = empty_controlnet(Path(config or CONFIGS / _FAMILIES[width]))
    original = "time_embed.0.weight" in tensors
    converted = convert_controlnet_checkpoint(tensors, model.config) if original else tensors
    wanted = model.state_dict().keys()
    if lost := sorted(name for name in wanted if converted.get(name) is None):
        raise lacking(lost, "ControlNet")
    if len(tensors) > len(wanted):
        raise Unfit(f"has {len(tensors)} weights, and a ControlNet of Stable Diffusion {len(wanted)}", _REMEDY)
    model.load_state_dict({name: converted[name].float() for name in wanted}, assign=True)
    if path.stem.removesuffix("_fp16").endswith("shuffle"):  # which nothing in the file says, as in ComfyUI
        model.register_to_config(global_pool_conditions=True)
    return model


def empty_controlnet(folder: Path) -> ControlNetModel:
    """Of the checkpoints whose configurations are in a folder: half a U-Net, without content."""
    layout = json.loads((folder / "unet" / "config.json").read_text())
    settings = inspect.signature(ControlNetModel.__init__).parameters
    with torch.device("meta"):
        return ControlNetModel(**{name: value for name, value in layout.items() if name in settings})


def _check_kind(shapes: dict[str, list[int]]) -> int:
    """The width of the text that a file's model takes, by the shapes of its tensors."""
    for mark, kind in _OTHERS.items():
        if any(name.startswith(mark) for name in shapes):
            raise Unfit(f"is {kind}", _REMEDY)
    text = next((name for name in shapes if name.endswith("attn2.to_k.weight")), None)
    hint = any(name.startswith(("input_hint_block.", "controlnet_cond_embedding.")) for name in shapes)
    if not hint or text is None:
        raise Unfit(f"is no ControlNet (it lacks {'attn2.to_k' if hint else 'input_hint_block'})", _REMEDY)
    return shapes[text][1]
