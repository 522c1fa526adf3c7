"""The classes of an inflated MODEL, and what they refuse: ControlNets, LoRAs and CONDITIONING of another family."""

import copy
import logging
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import comfy.controlnet
import comfy.model_base
import comfy.model_patcher
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase
from torch import Tensor

from ..tav_core import TavError, VideoUNet


def check_hints(net: comfy.controlnet.ControlBase, frames: int):
    """Raises a TavError for hints that are neither one for all frames nor one for each, as the core would cut them."""
    hints, name = len(net.cond_hint_original), getattr(net, "name", None)
    if hints not in (1, frames):
        problem = f"has {hints} hints, LATENT has {frames} frames"
        remedy = f"give it 1 image for all frames, or {frames}"
        raise TavError("ControlNet" if name else "ControlNet or T2I-Adapter", name, problem, remedy)


def check_hints_in_windows(guider: comfy.samplers.CFGGuider, frames: int):
    """Raises a TavError for a hint for each frame under ComfyUI's own Context Windows, which would give each window the
    first ones.
    """
    handler = guider.model_options.get("context_handler")
    if handler is None or frames <= getattr(handler, "context_length", frames):
        return
    for cond in chain(*guider.original_conds.values()):
        net = cond.get("control")
        while net is not None:
            if len(net.cond_hint_original) > 1:
                problem = "has a hint for each frame, which Context Windows of ComfyUI itself don't take along"
                raise TavError("ControlNet", getattr(net, "name", None), problem, "use Context Windows (Tune-A-Video)")
            net = net.previous_controlnet


def check_place(noise: Tensor, area: tuple[int, ...] | None = None, mask: Tensor | None = None, **_):
    """Raises a TavError for an area of a prompt outside of latents `f c h w`, or masks that are too many or too few."""
    frames, _, height, width = noise.shape
    if area is not None and (area[-2] >= height or area[-1] >= width):
        problem = f"has an area at {8 * area[-1]}, {8 * area[-2]}, outside of the frames ({8 * width} x {8 * height})"
        raise TavError("CONDITIONING", None, problem, "set it inside of them")
    if mask is not None and frames % len(mask):
        problem = f"has {len(mask)} masks for {frames} frames"
        raise TavError("CONDITIONING", None, problem, "give it one for all, or one for each frame")


class OneFamily:
    """Mixin for a `BaseModel` around a diffusers U-Net. Refused are foreign ControlNets, hints, areas and masks that
    fit no clip, and masks that keep only noise.
    """

    def extra_conds(self, **kwargs) -> dict[str, Any]:
        net, frames = kwargs.get("control"), len(kwargs["noise"])
        if isinstance(self.diffusion_model, VideoUNet):
            check_place(**kwargs)
        while net is not None:
            if isinstance(net, comfy.controlnet.ControlLora):
                remedy = "use a whole ControlNet with an inflated one"
                raise TavError("Control-LoRA", None, "needs the weights of a native MODEL", remedy)
            if (module := getattr(net, "control_model", None)) is not None:
                widths = {
                    weight.shape[1] for name, weight in module.named_parameters() if name.endswith("attn2.to_k.weight")
                }
                if widths != {self.diffusion_model.config.cross_attention_dim}:
                    problem = "is for another family of models"
                    raise TavError("ControlNet", None, problem, "use one for the family of MODEL")
            if isinstance(self.diffusion_model, VideoUNet):
                check_hints(net, frames)
            net = net.previous_controlnet
        return super().extra_conds(**kwargs)

    def scale_latent_inpaint(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, **kwargs) -> Tensor:
        """What a stock noise mask puts outside of it: the latent under as much noise as the sampler is at."""
        if isinstance(self.diffusion_model, VideoUNet) and not noise.any():  # the latent is inverted noise itself
            problem = "on inverted noise needs to know what the clip was inverted with"
            remedy = "connect MODEL through Attention Injection (share 0 will do), or use Video Sampler"
            raise TavError("noise_mask", None, problem, remedy)
        return super().scale_latent_inpaint(sigma=sigma, noise=noise, latent_image=latent_image, **kwargs)


class NativeModel(OneFamily, comfy.model_base.BaseModel):
    pass


class InflatedSDXL(OneFamily, comfy.model_base.SDXL):
    """The native SDXL around another U-Net; `NativeModel`s become one by `adopt`."""

    def adopt(self, source: comfy.model_base.SDXL):
        """Take what encodes the vector from `source`."""
        self.embedder, self.noise_augmentor = (
            copy.deepcopy(source.embedder).cpu(),
            copy.deepcopy(source.noise_augmentor).cpu(),
        )

    def encode_adm(self, **kwargs) -> Tensor:
        if "pooled_output" not in kwargs and "unclip_conditioning" not in kwargs:
            problem = "has no pooled text, which SDXL needs"
            raise TavError("CONDITIONING", None, problem, "use CLIP Text Encode with the CLIP of the same checkpoint")
        return super().encode_adm(**kwargs)


class NativePatcher(getattr(comfy.model_patcher, "CoreModelPatcher", ModelPatcher)):  # newer cores
    """A MODEL around a diffusers U-Net: LoRAs that would do nothing are refused, hooks hold wherever its layers are."""

    def add_patches(self, patches, *args, **kwargs):
        weights, added = self.model.state_dict(), super().add_patches(patches, *args, **kwargs)
        if not added:
            problem = "names no weights of MODEL: it is for another family, or has the names of the original code"
            raise TavError("LoRA (or merge)", None, problem, "connect it before Inflate")
        for key in added:
            if isinstance(key, str):
                check_lora(key, weights[key], patches[key])
        return added

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        # a layer that stays on the CPU gets its patches when it runs: tuned weights would replace what a hook put there
        dynamic = hasattr(self, "is_dynamic") and self.is_dynamic()  # newer cores then refuse to be forced
        force = force_patch_weights or bool(self.hook_patches) and not dynamic
        return super().partially_load(device_to, extra_memory, force)


def check_lora(key: str, weight: Tensor, patch: Any):
    """Refuse a LoRA whose text has another width, or one of other kinds (LoHa, LoKr ...) that fits no text projection.

    Raises:
        TavError: it does.
    """
    if not (key.endswith("attn2.to_k.weight") and isinstance(patch, WeightAdapterBase)):
        return
    if not isinstance(patch, LoRAAdapter):
        with torch.no_grad(), nothing_swallowed(key):
            patch.calculate_weight(torch.zeros(weight.shape), key, 1.0, 1.0, None, lambda change: change)
        return
    own, wanted = patch.weights[1].shape[1], weight.shape[1]
    if own != wanted:
        problem = f"is for another family of models (its text has width {own}, that of MODEL {wanted})"
        raise TavError("LoRA", None, problem, "use one for the family of MODEL")


@contextmanager
def nothing_swallowed(name: str) -> Iterator[None]:
    """The core logs a LoRA that it can't apply to a weight, and goes on without: one would tune on the wrong base.

    Raises:
        TavError: it logged something inside.
    """
    logger, told, listener = logging.getLogger(), [], logging.Handler(logging.WARNING)
    listener.emit, thread, level = told.append, threading.get_ident(), logger.level
    logger.addHandler(listener)
    logger.setLevel(min(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(listener)
    if said := [record.getMessage() for record in told if record.thread == thread]:
        problem = f"can't be applied to {name} ({textwrap.shorten(said[0], 200)})"
        raise TavError("LoRA (or another patch of MODEL)", None, problem, "leave it out, or give one for this MODEL")
