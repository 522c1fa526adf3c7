"""Attention Injection: a MODEL whose samples attend as the clip does that their noise was inverted from.

It can also leave a part of the clip as it is, outside of a region or of a noise mask: the noise reconstructs it.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.conds import CONDCrossAttn
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from einops import rearrange
from torch import Tensor

from ..tav_core import TavError
from ..tav_core.errors import field
from ..tav_core.injection import REGIONS, EditPlaces, Led, SourceWalk
from .common import hidden_states, plain_errors, schema
from .native import ANCHOR, SOURCE_ROWS, video_unet
from .sdxl import vector_of

WRAPPER = "model_function_wrapper"


class Injection:
    """A MODEL's calls in a sampler, beside which the clip walks (see `tav_core.injection.SourceWalk`).

    It is the MODEL's function wrapper and, with `sample`, a wrapper of its whole sampling. A noise mask (stock Set
    Latent Noise Mask) limits what may change as well, together with `region`, in a sampling that starts from the latent
    itself. In one that adds noise it keeps its stock meaning.

    Args:
        text: what the clip was inverted with, `1 n d`.
        vector: the rest of it for latents of a size, where the MODEL is SDXL.
        share: of the sampler's steps, from the first on, in which the clip leads (0 ... 1).
        subject: MASK of the clip's subject, `f h w` or `1 h w`, whose features lead as well; None without.
        region: what may change, one of `REGIONS`.
        steady: whether, with a `subject`, the edit's background stands still where the clip's does.
        inner: the wrapper that the MODEL had before.
    """

    def __init__(
        self,
        text: Tensor,
        vector: Callable[[Tensor], Tensor | None],
        share: float,
        subject: Tensor | None,
        region: str,
        steady: bool,
        inner: Callable | None,
    ):
        self.text, self.vector, self.inner = text, vector, inner
        self.subject, self.region, self.steady = subject, region, steady
        self.walk = SourceWalk(share)

    def sample(
        self,
        executor: Callable,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        *args,
        **kwargs,
    ) -> Tensor:
        """Wraps the whole sampling.

        Raises:
            TavError: a subject of another number of frames.
        """
        places = EditPlaces()
        if self.subject is not None:
            mask = rearrange(at_size(self.subject, noise), "f 1 h w -> 1 1 f h w")
            places = EditPlaces.of(self.region, mask, margin=1, steady=self.steady)
        if denoise_mask is not None and not noise.any():
            mask = rearrange(noise_mask(denoise_mask, noise), "f 1 h w -> 1 1 f h w")
            changeable = mask if places.changeable is None else mask * places.changeable
            places, denoise_mask = replace(places, changeable=changeable), None
        self.walk.begin(places)
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)

    def __call__(self, apply_model: Callable, args: dict[str, Any]) -> Tensor:
        x, kinds, options = args["input"], args["cond_or_uncond"], args["c"]["transformer_options"]
        if "context_window" in options:  # of the core: it doesn't say what it makes of the clip's other frames
            problem = (
                "comes through Attention Injection (a noise mask in Video Sampler needs it too) and through Context "
                "Windows of ComfyUI itself, which don't go together"
            )
            raise TavError("MODEL", None, problem, "use Context Windows (Tune-A-Video)")
        frames = len(x) // len(kinds)

        def ask(videos: Tensor, led: Led | None) -> Tensor:  # k c f h w
            given = args if led is None else self.beside(args, rearrange(videos, "k c f h w -> (k f) c h w"), led)
            if self.inner:
                out = self.inner(apply_model, given)
            else:
                out = apply_model(given["input"], given["timestep"], **given["c"])
            return rearrange(out, "(k f) c h w -> k c f h w", f=frames)

        videos, sigma = rearrange(x, "(k f) c h w -> k c f h w", f=frames), args["timestep"][0]
        out = self.walk(ask, videos, sigma, options["sample_sigmas"], len(kinds))
        return rearrange(out, "k c f h w -> (k f) c h w")

    def beside(self, args: dict[str, Any], x: Tensor, led: Led) -> dict[str, Any]:
        """The arguments of a call in which the clip's own frames stand in front, with what it was inverted with."""
        c, kinds = dict(args["c"]), [1, *args["cond_or_uncond"]]
        frames = len(x) // len(kinds)
        text = CONDCrossAttn(comfy.utils.repeat_to_batch_size(self.text.to(x), frames))
        c["c_crossattn"] = text.concat([CONDCrossAttn(c["c_crossattn"].to(x))])  # so far it is where CLIP left it
        if "y" in c:
            vector = comfy.utils.repeat_to_batch_size(self.vector(x).to(c["y"]), frames)
            c["y"] = torch.cat([vector, c["y"]])
        if c.get("control"):  # the clip itself is under no ControlNet
            c["control"] = {
                place: [_led_by_none(residual, frames) for residual in entries]
                for place, entries in c["control"].items()
            }
        options = {"cond_or_uncond": kinds, SOURCE_ROWS: led.sources * frames}
        if led.anchor is not None:
            options[ANCHOR] = led.anchor
        c["transformer_options"] = {**c["transformer_options"], **options}
        timestep = torch.cat([args["timestep"][:frames], args["timestep"]])
        return {**args, "input": x, "c": c, "cond_or_uncond": kinds, "timestep": timestep}

    def __deepcopy__(self, memo: dict) -> "Injection":
        """Itself: clones of a MODEL, whose options older cores copy deeply, keep `sample` as well, which goes on with
        this.
        """
        return self


def _led_by_none(residual: Tensor | None, rows: int) -> Tensor | None:
    return None if residual is None else torch.cat([torch.zeros_like(residual[:rows]), residual])


def at_size(mask: Tensor, latents: Tensor) -> Tensor:
    """A MASK, `f h w` or `1 h w`, for latents `f c h w`: `f 1 h w`.

    Raises:
        TavError: it has another number of frames.
    """
    _check_count("subject", len(mask), len(latents))
    mask = F.adaptive_avg_pool2d(mask[:, None].to(latents), latents.shape[-2:])
    return mask.expand(len(latents), -1, -1, -1)


def noise_mask(mask: Tensor, latents: Tensor) -> Tensor:
    """A noise mask, `f 1 h w` or `1 1 h w`, for latents `f c h w`, scaled as stock samplers do: `f 1 h w`."""
    if mask.shape != latents.shape:  # newer cores have scaled it, for each channel, before anything of a MODEL sees it
        mask = comfy.sampler_helpers.prepare_mask(mask, latents.shape, latents.device)
    return mask[:, :1]


def with_checked_masks(sample: Callable) -> Callable:
    """`CFGGuider.sample`, in which an `Injection` refuses noise masks of another number of frames.

    The core repeats or cuts them, in newer cores before any wrapper of the MODEL is called: here alone they can be
    counted.
    """

    @wraps(sample)
    def checked(guider, noise, latent_image, sampler, sigmas, denoise_mask=None, *args, **kwargs):
        if denoise_mask is not None and has_injection(guider.model_patcher) and not noise.any():
            _check_count("noise_mask", denoise_mask[..., 0, 0].numel(), len(latent_image))
        return sample(guider, noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)

    return checked


comfy.samplers.CFGGuider.sample = with_checked_masks(comfy.samplers.CFGGuider.sample)


def _check_count(name: str, masks: int, frames: int):
    if masks not in (1, frames):
        problem = f"has {masks} masks for {frames} frames"
        raise TavError(name, None, problem, "give one for all, or one for each frame")


def with_injection(
    model: ModelPatcher,
    conditioning: list,
    share: float,
    region: str = "everything",
    subject: Tensor | None = None,
    steady: bool = True,
) -> ModelPatcher:
    """A clone of an inflated MODEL with an `Injection`.

    Args:
        conditioning: what the clip was inverted with.

    Raises:
        TavError: it isn't inflated, or the CONDITIONING isn't for it.
    """
    video_unet(model)  # raises for a model that isn't inflated
    text = hidden_states(model, conditioning, "conditioning")
    model = without_injection(model)
    inner = model.model_options.get(WRAPPER)
    model = model.clone()
    injection = Injection(text, partial(vector_of, model, conditioning), share, subject, region, steady, inner)
    model.set_model_unet_function_wrapper(injection)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER, injection.sample)
    return model


def has_injection(model: ModelPatcher) -> bool:
    return isinstance(model.model_options.get(WRAPPER), Injection)


def without_injection(model: ModelPatcher) -> ModelPatcher:
    """The MODEL without `Injection`, for inverting with it."""
    if not has_injection(model):
        return model
    injection, model = model.model_options[WRAPPER], model.clone()
    del model.model_options[WRAPPER]
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER)
    if injection.inner:
        model.set_model_unet_function_wrapper(injection.inner)
    return model


class AttentionInjection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TAVAttentionInjection",
            display_name="Attention Injection (Tune-A-Video)",
            description="Keeps more of the clip's layout and motion in the edits: in the first steps they attend as "
                        "the clip does. Goes between the tuned MODEL and any sampler that starts from the noise of "
                        "DDIM Inversion.",
            search_aliases=["plug and play", "fatezero", "keep structure", "keep motion"],
            advanced=("steady",),
            inputs=[
                io.Model.Input("model", tooltip="The tuned MODEL."),
                io.Conditioning.Input("conditioning",
                                      tooltip="What the clip was inverted with: that of DDIM Inversion."),
                io.Float.Input("share", default=0.6, min=0.0, max=1.0, step=0.05,
                               tooltip="Share of the sampling steps, from the first on. More keeps more of the clip's "
                                       "layout and motion; less lets the edit go further. 0: as in the paper."),
                io.Combo.Input("region", options=list(REGIONS), default="everything",
                               tooltip="What the edit may change. The rest is what the noise reconstructs of the clip. "
                               "subject and background need the mask."),
                io.Boolean.Input("steady", default=True,
                                 tooltip="With the mask: a background that the edit draws anew stands still where the "
                                         "clip's does. Turn it off for one that should move, such as a fire or a "
                                         "crowd."),
                io.Mask.Input("subject", optional=True,
                              tooltip="Where the subject is, a mask for each frame or one for all: from Subject Mask, "
                                      "or of any other node. It is kept in its place."),
            ],
            outputs=[io.Model.Output(tooltip="For a sampler with add_noise disabled. A sampling step takes half as "
                                             "long again.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, conditioning, share, region="everything", steady=True, subject=None) -> io.NodeOutput:
        with plain_errors(attention_injection="share"):
            if region != "everything" and subject is None:
                remedy = f"connect {field('subject')} to Subject Mask"
                raise TavError("region", region, "needs to know where the subject is", remedy)
            model = with_injection(model, conditioning, share, region, subject, steady)
        return io.NodeOutput(model)
