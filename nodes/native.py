"""The bridge to ComfyUI: a diffusers U-Net as a native MODEL, and a native MODEL as a diffusers U-Net.

Frames are the batch of LATENT, as everywhere in ComfyUI, so that stock samplers, guiders and previews work on an
inflated MODEL as on any other.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import comfy.ldm.modules.attention
import comfy.lora
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP, copy_nested_dicts, get_all_wrappers
from diffusers import DDIMScheduler, UNet2DConditionModel
from einops import rearrange
from torch import Tensor, nn

from ..tav_core import ContextWindows, TavError, VideoUNet, inflate
from ..tav_core.attention import FrameAttnProcessor, FrameContext
from ..tav_core.inflation import OverFrames, TunedLinear, VideoGroupNorm
from ..tav_core.trainable import is_tuned
from .layout import unet_layout
from .native_model import InflatedSDXL, NativeModel, NativePatcher, check_lora, nothing_swallowed
from .patches import patched

PREFIX = "diffusion_model."
COMPILED = "torch.compile"  # the core's key of wrappers that call a compiled model
FRAMES = "tav_num_frames"  # in transformer_options: the length of the clip that the MODEL was tuned on
WINDOWS = "tav_context_windows"  # context_length (0: the tuned one) and context_overlap
SOURCE_ROWS = "tav_source_rows"  # so many entries of the batch, the first ones, lead the attention of the others
ANCHOR = "tav_anchor"  # where the features of those lead as well, `(chunks frames) 1 h w`
_LEAVES = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)


class Wrapped:
    """Mixin: what ComfyUI calls, within the wrappers that packs put around native models."""

    def forward(self, x, timesteps, context=None, y=None, control=None, transformer_options=None, **kwargs):
        options = {} if transformer_options is None else transformer_options
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        executor = WrapperExecutor.new_class_executor(self.predict, self, wrappers)
        return executor.execute(x, timesteps, context, y, control, options, **kwargs)


class NativeUNet(Wrapped, UNet2DConditionModel):
    """A diffusers U-Net that ComfyUI's samplers call. Its children have the names that diffusers LoRAs speak of."""

    frame_context: FrameContext  # of one frame

    def predict(self, x, timesteps, context, y, control, options, **kwargs):
        check_inputs(self, x, context)
        attention_fn = partial(comfy_attention, options=options)
        with self.frame_context.running(attention_fn=attention_fn), patched(self, x, control, options):
            return UNet2DConditionModel.forward(self, x, timesteps, context, class_labels=y, return_dict=False)[0]


class NativeVideoUNet(Wrapped, VideoUNet):
    """The same for an inflated U-Net. `x` is `(chunks frames) c h w`: a chunk is a positive or a negative prompt."""

    def predict(self, x, timesteps, context, y, control, options, **kwargs):
        check_inputs(self, x, context)
        frames = len(x) // len(options.get("cond_or_uncond", [0]))

        def unet(latents, timesteps, context, control, **settings):  # b c f h w, of all frames or of a window
            with patched(self, rearrange(latents, "b c f h w -> (b f) c h w"), control, options):
                return VideoUNet.forward(self, latents, timesteps, context, **settings)

        if windows := windows_of(options):
            unet = partial(windows, unet)
        elif FRAMES in options:
            frames = frames_of_a_clip(frames, options[FRAMES], options.get("context_window"))
        sources, attention_fn = options.get(SOURCE_ROWS, 0) // frames, partial(comfy_attention, options=options)
        with self.frame_context.running(sources=sources, attention_fn=attention_fn):
            out = unet(
                rearrange(x, "(b f) c h w -> b c f h w", f=frames),
                timesteps[::frames],
                context,
                control=control,
                anchor=options.get(ANCHOR),
                class_labels=y,
            )
        return rearrange(out, "b c f h w -> (b f) c h w")


def frames_of_a_clip(frames: int, tuned: int, window: Any | None) -> int:
    """How many of the frames of a forward belong to one clip.

    Args:
        tuned: what the MODEL was tuned on.
        window: of the core's own Context Windows, if the frames are one. Newer cores put the frame before it in front,
            whose result they drop: the window sees it as its frame 0, one more than the MODEL was tuned on.

    Raises:
        TavError: frames that the MODEL wasn't tuned on.
    """
    if window is None:
        if frames % tuned:
            raise TavError(
                "LATENT",
                None,
                f"has {frames} frames, this MODEL was tuned on {tuned}",
                f"give it {tuned} frames (set count in Load Video), a multiple (several clips), or a long clip through "
                "Context Windows (Tune-A-Video)",
            )
        return tuned
    length = frames - (getattr(window, "causal_anchor_index", None) is not None)
    if length != tuned:
        problem = f"gives a window of {length} frames, this MODEL was tuned on {tuned}"
        remedy = f"set it to {tuned}, or use Context Windows (Tune-A-Video), which needs no number"
        raise TavError("context_length", None, problem, remedy)
    return frames


def windows_of(options: Mapping[str, Any]) -> ContextWindows | None:
    """The context windows in the transformer_options of a MODEL.

    Raises:
        TavError: windows of the tuned length, and the MODEL isn't tuned; or an overlap that doesn't fit it.
    """
    if WINDOWS not in options:
        return None
    length, overlap = options[WINDOWS]
    if not length and FRAMES not in options:
        raise TavError(
            "context_length", 0, "is the tuned length, and MODEL isn't tuned", "give it a number, or tune MODEL"
        )
    return ContextWindows(length or options[FRAMES], overlap)


def check_inputs(unet: UNet2DConditionModel, x: Tensor, context: Tensor):
    if x.shape[1] != unet.config.in_channels:
        problem = f"has {x.shape[1]} channels, this MODEL takes {unet.config.in_channels}"
        raise TavError("LATENT", None, problem, "use the VAE of the same checkpoint")
    check_context(unet, context)


def check_context(unet: UNet2DConditionModel, context: Tensor):
    width, wanted = context.shape[-1], unet.config.cross_attention_dim
    if width != wanted:
        raise TavError(
            "CONDITIONING", None, f"has width {width}, this MODEL takes {wanted}", "use the CLIP of the same checkpoint"
        )


def comfy_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, options: dict[str, Any] | None = None
) -> Tensor:
    """Attention on `b heads n d` by the function that the user chose for ComfyUI, or for this MODEL in its options."""
    module = comfy.ldm.modules.attention
    function = module.optimized_attention if mask is None else module.optimized_attention_masked
    if mask is not None and mask.dtype == torch.bool:  # not all of them take it
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.finfo(q.dtype).max)
    heads = q.shape[1]
    q, k, v = (
        rearrange(x, "b heads n d -> b n (heads d)") for x in (q, k, v)
    )  # as the native U-Net, which an override knows
    out = function(q, k, v, heads, mask=mask, transformer_options=options)
    return rearrange(out, "b n (heads d) -> b heads n d", heads=heads)


# ------------------------------------------------------------------------------------- from diffusers to MODEL


def use_operations(model: nn.Module, operations: Any):
    """Make the layers of a model ComfyUI's: casting, partial loading and interruption happen in them."""
    for module in model.modules():
        if type(module) in _LEAVES:
            module.__class__ = getattr(operations, type(module).__name__)


def to_native(
    unet: UNet2DConditionModel, model_config: Any, model_type: Any, disable_dynamic: bool = False
) -> ModelPatcher:
    """A native MODEL around a diffusers U-Net, which changes class in place.

    Args:
        unet: 2D or inflated.
        model_config: one of `comfy.supported_models`, with its inference dtype set.
        model_type: a `comfy.model_base.ModelType`.
        disable_dynamic: no dynamic VRAM, where the core has it.
    """

    def build(device, operations, **_):
        unet.requires_grad_(False)
        for module in unet.modules():
            if type(module) is VideoGroupNorm:
                module.__class__ = type("VideoGroupNorm", (OverFrames, operations.GroupNorm), {})
            elif type(module) is TunedLinear:
                module.__class__ = nn.Linear
        use_operations(unet, operations)
        if isinstance(unet, VideoUNet):
            unet.__class__ = NativeVideoUNet
        else:
            unet.__class__, unet.frame_context = NativeUNet, FrameContext()
            unet.set_attn_processor(FrameAttnProcessor(unet.frame_context, None))
        unet.frame_context.set(attention_fn=comfy_attention)
        return nn.Module.to(unet, device=device, dtype=model_config.unet_config["dtype"])

    offload = comfy.model_management.unet_offload_device()
    model = NativeModel(model_config, model_type, device=offload, unet_model=build)
    patcher = ModelPatcher if disable_dynamic else NativePatcher
    return patcher(model, load_device=comfy.model_management.get_torch_device(), offload_device=offload)


def inflate_model(model: ModelPatcher, disable_dynamic: bool = False, **options) -> ModelPatcher:
    """The inflated MODEL of a native SD 1.x, 2.x or SDXL MODEL, its LoRAs baked in. `model` stays as it is.

    Args:
        disable_dynamic: no dynamic VRAM, where the core has it.
        options: those of `tav_core.inflate`.

    Raises:
        TavError: a model of another family, or an inflated one.
    """
    source = model.model
    if model.get_wrappers(WrappersMP.APPLY_MODEL, COMPILED):  # which would call the image model in place of the video's
        raise TavError("MODEL", None, "is compiled, as an image model", "connect what compiles it behind Inflate")
    with torch.inference_mode(False):
        unet = inflate(to_diffusers(model), **options)
        unet_config = {k: v for k, v in source.model_config.unet_config.items() if k != "num_res_blocks"}
        model_config = type(source.model_config)(unet_config)
        model_config.set_inference_dtype(
            source.get_dtype(), source.manual_cast_dtype
        )  # weights may be as in their file
        model_config.latent_format = source.latent_format
        inflated = to_native(unet, model_config, source.model_type, disable_dynamic)
        if isinstance(source, comfy.model_base.SDXL):
            inflated.model.__class__ = InflatedSDXL
            inflated.model.adopt(source)
    inflated.model.model_sampling = model.get_model_object("model_sampling")
    inflated.model.memory_usage_factor = source.memory_usage_factor
    inflated.model_options = comfy.model_patcher.create_model_options_clone(model.model_options)
    inflated.wrappers = copy_nested_dicts(model.wrappers)
    inflated.cached_patcher_init = (partial(inflate_model, **options), (model,))  # how newer cores make another one
    return inflated


# ------------------------------------------------------------------------------------- from MODEL to diffusers


def to_diffusers(model: ModelPatcher) -> UNet2DConditionModel:
    """The 2D diffusers U-Net of a MODEL, with the weights that its LoRAs make. `model` stays as it is.

    Raises:
        TavError: a model of another family, or an inflated one.
    """
    unet = model.model.diffusion_model
    if isinstance(unet, VideoUNet):
        raise TavError("MODEL", None, "is inflated already", "connect it to One-Shot Tune or a sampler as it is")
    if isinstance(unet, NativeUNet):
        return _filled(unet.config, baked_weights(model))
    if not isinstance(unet, UNetModel):
        kind = type(model.model).__name__
        raise TavError(
            "MODEL", None, f"is of another family ({kind})", "give a Stable Diffusion 1.x, 2.x or SDXL checkpoint"
        )
    layout = unet_layout(model.model, unet)
    native = baked_weights(model)
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    names = {
        name: key for name, key in names.items() if not name.startswith("add_embedding.")
    }  # class_embedding is the same
    return _filled(layout, {name: native[key] for name, key in names.items() if key in native})


def baked_weights(model: ModelPatcher) -> dict[str, Tensor]:
    """Its `weights` for a U-Net of their own.

    Raises:
        TavError: what `weights` raises, and a LoRA of newer cores' bypass loaders, which is in no weight.
    """
    if injected := ", ".join(getattr(model, "injections", {})):
        problem = f"has layers of another node put in ({injected}), which can't be baked in"
        raise TavError("MODEL", None, problem, "use nodes that patch its weights, such as Load LoRA")
    return weights(model)


@torch.no_grad()  # the tensors of a LoRA may be those of an inference mode, which autograd doesn't take
def weights(model: ModelPatcher) -> dict[str, Tensor]:
    """The U-Net's weights by name, with every patch (LoRA, tuned weights) applied, on the offload device.

    Weights without patches are those of the model itself, not copies.

    Raises:
        TavError: a LoRA of another family, one that the core can't apply, or weights that can't be had in full numbers.
    """
    baked = {}
    for key, ((weight, convert), *patches) in model.get_key_patches(PREFIX).items():
        name = key.removeprefix(PREFIX)
        weight = convert(weight, inplace=False)  # quantised ones to full numbers, others as they are
        if not weight.is_floating_point():
            problem = f"is quantised in a way of its own ({name} is {weight.dtype})"
            raise TavError("MODEL", None, problem, "load it in fp16, bf16, fp32 or fp8")
        if patches:
            for _, patch, *_ in patches:
                check_lora(key, weight, patch)
            with nothing_swallowed(name):
                copied = weight.to(device=model.offload_device, dtype=torch.float32, copy=True)
                weight = comfy.lora.calculate_weight(patches, copied, key).to(weight.dtype)
        baked[name] = weight
    return baked


def _filled(config: Mapping[str, Any], state: Mapping[str, Tensor], **options) -> UNet2DConditionModel:
    """A U-Net of that configuration with a copy of those weights, on the CPU; inflated if there are `options`."""
    with torch.inference_mode(False):
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(dict(config))
        if options:
            unet = inflate(unet, **options)
        copies = {name: weight.detach().to(device="cpu", copy=True) for name, weight in state.items()}
        unet.load_state_dict(copies, assign=True)
    return unet.eval()


def trainable_copy(model: ModelPatcher) -> VideoUNet:
    """A plain video U-Net with the weights of an inflated MODEL, on the CPU, ready for `tav_core.tune`."""
    unet = video_unet(model)
    return _filled(unet.config, baked_weights(model), **unet.inflation)


def video_unet(model: ModelPatcher) -> NativeVideoUNet:
    """The U-Net of an inflated MODEL.

    Raises:
        TavError: it isn't inflated.
    """
    unet = model.model.diffusion_model
    if not isinstance(unet, NativeVideoUNet):
        raise TavError("MODEL", None, "is not inflated", "connect it through the node Inflate first")
    return unet


def with_tuned_weights(model: ModelPatcher, tuned: Mapping[str, Tensor], num_frames: int) -> ModelPatcher:
    """A clone of an inflated MODEL that has tuned weights, as patches: the model that it shares stays as it is."""
    model = model.clone()
    model.add_patches({PREFIX + name: ("set", (weight,)) for name, weight in tuned.items()})
    options = model.model_options["transformer_options"]
    model.model_options["transformer_options"] = {**options, FRAMES: num_frames}
    return model


def scheduler_of(model: ModelPatcher) -> DDIMScheduler:
    """The noise schedule of a MODEL as a diffusers scheduler.

    Raises:
        TavError: a continuous one, or a model that predicts neither the noise nor v.
    """
    sampling = model.get_model_object("model_sampling")
    known = {comfy.model_sampling.EPS: "epsilon", comfy.model_sampling.V_PREDICTION: "v_prediction"}
    prediction = next((known[kind] for kind in type(sampling).__bases__ if kind in known), None)
    if prediction is None or not isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete):
        kinds = ", ".join(kind.__name__ for kind in type(sampling).__bases__)
        raise TavError(
            "MODEL", None, f"is sampled in a way that can't be tuned ({kinds})", "use an SD 1.x, 2.x or SDXL checkpoint"
        )
    alphas = 1 / (1 + sampling.sigmas.cpu().double() ** 2)
    betas = 1 - alphas / torch.cat([torch.ones(1), alphas[:-1]])
    return DDIMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas.tolist(),
        prediction_type=prediction,
        clip_sample=False,
        steps_offset=1,
    )


def trainable_weights(model: ModelPatcher) -> dict[str, Tensor]:
    """Those of the `weights` of an inflated MODEL that the method tunes."""
    return {name: weight for name, weight in weights(model).items() if is_tuned(name)}
