"""Load ControlNet (diffusers): the shipped mini one or a diffusers folder as a native CONTROL_NET."""

from pathlib import Path

import comfy.controlnet
import comfy.model_management
import comfy.ops
import folder_paths
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_base import BaseModel
from comfy_api.latest import io
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import nn

from ..tav_core import TavError, load_controlnet
from ..tav_core.checkpoint import MINI_CONTROLNET
from ..tav_core.control import Family, family, told
from .common import schema
from .errors import plain_errors
from .folders import found, read_config
from .inputs import check_name, checked, usable
from .native import use_operations
from .native_model import check_hints


def choices() -> dict[str, Path]:
    """What can be loaded, by name: mini, and diffusers ControlNets in models/controlnet and models/diffusers."""
    nets = {"mini": MINI_CONTROLNET}
    roots = [path for kind in ("controlnet", "diffusers") for path in folder_paths.get_folder_paths(kind)]
    for name, folder in found(roots, "config.json"):
        if read_config(folder / "config.json").get("_class_name") == ControlNetModel.__name__:
            nets.setdefault(name, folder)
    return nets


def path_of(controlnet: str) -> Path:
    """The folder of a choice.

    Raises:
        TavError: it is none.
    """
    check_name("controlnet", controlnet)
    if (folder := choices().get(controlnet)) is None:
        problem = "is neither mini nor a folder of a ControlNetModel in models/controlnet or models/diffusers"
        raise TavError("controlnet", controlnet, problem, "put it there, or choose another one")
    return folder


class NativeControlNet(ControlNetModel):
    """A diffusers ControlNet that ComfyUI calls as its own."""

    device: torch.device | None = None  # ModelPatcher sets it, which diffusers' property would not allow

    def forward(self, x, timesteps, context, hint, **kwargs):
        down, middle = super().forward(x, timesteps, context, hint, return_dict=False)
        return {"output": list(down), "middle": [middle]}


class Control(comfy.controlnet.ControlNet):
    """A CONTROL_NET around a diffusers ControlNet. It says what doesn't fit; the core would fail inside or cycle."""

    name = ""

    def copy(self) -> "Control":
        copied = super().copy()
        copied.__class__, copied.name = type(self), self.name
        return copied

    def pre_run(self, model: BaseModel, percent_to_timestep_function):
        own, wanted = family(self.control_model.config), family_of(model)
        if own != wanted:
            problem = f"is for another family of models ({told(own)}; MODEL: {told(wanted)})"
            raise TavError("ControlNet", self.name, problem, "use one for the family of MODEL")
        super().pre_run(model, percent_to_timestep_function)

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        check_hints(self, len(x_noisy) // batched_number)
        return super().get_control(x_noisy, t, cond, batched_number, transformer_options)


def family_of(model: BaseModel) -> Family | None:
    """Of a native MODEL; None if it is no U-Net that sees text."""
    unet = model.diffusion_model
    if isinstance(unet, UNet2DConditionModel):
        return family(unet.config)
    if not isinstance(unet, UNetModel):
        return None
    config = model.model_config.unet_config
    return config["context_dim"], tuple(unet.model_channels * m for m in unet.channel_mult), tuple(unet.num_res_blocks)


class LoadControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TAVLoadControlNet",
            display_name="Load ControlNet (diffusers)",
            description="Loads the ControlNet of the mini checkpoint, or a diffusers folder of a ControlNet for Stable "
            "Diffusion 1.x or 2.x, for the stock Apply ControlNet. For a single file use the stock Load ControlNet "
            "Model.",
            search_aliases=["load controlnet diffusers", "mini controlnet"],
            inputs=[
                io.Combo.Input("controlnet", display_name="ControlNet", options=list(choices()), default="mini",
                               tooltip="mini takes the silhouette of the subject, white on black."),
            ],
            outputs=[
                io.ControlNet.Output(tooltip="For Apply ControlNet, with one hint for all frames or one for each."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, controlnet=None) -> bool | str:
        return usable(path_of, controlnet)

    @classmethod
    @checked
    def execute(cls, controlnet) -> io.NodeOutput:
        with plain_errors(), torch.inference_mode(False):
            folder = path_of(controlnet)
            net, management = load_controlnet(folder), comfy.model_management
            device = management.get_torch_device()
            dtype = management.unet_dtype(device, sum(p.numel() for p in net.parameters()))
            cast = management.unet_manual_cast(dtype, device)
            use_operations(net, comfy.ops.pick_operations(dtype, cast))
            net.__class__ = NativeControlNet
            nn.Module.to(net, device=management.unet_offload_device(), dtype=dtype)
            control = Control(net, load_device=device, manual_cast_dtype=cast)
            control.name = controlnet
            return io.NodeOutput(control)
