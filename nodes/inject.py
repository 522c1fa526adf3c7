"""Attention Injection: a MODEL whose samples attend as the clip does that their noise was inverted from.

It can also leave a part of the clip as it is, outside of a region or of a noise mask: the noise reconstructs it.
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.conds import CONDCrossAttn, CONDRegular
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from einops import rearrange
from torch import Tensor

from ..tav_core import TavError, VideoUNet
from ..tav_core.errors import field
from ..tav_core.injection import REGIONS, EditPlaces, SourceWalk
from .common import check_unlimited, hidden_states, schema
from .errors import plain_errors
from .inputs import checked, told
from .native import ANCHOR, FRAMES, SOURCE_ROWS, WINDOWS, video_unet
from .native_model import check_hints_in_windows
from .sdxl import vector_of

WRAPPER = "model_function_wrapper"


class Injection:
    """A MODEL's calls in a sampler, beside which the clip walks (see `tav_core.injection.SourceWalk`).

    It is the MODEL's function wrapper and, with `sample` and `calculate`, a wrapper of its whole sampling and of its
    noise levels. The clip walks as a whole; where a prompt is for an area, the same area of the clip leads it.

    A noise mask (stock Set Latent Noise Mask) limits what may change as well, together with `region`, in a sampling
    that starts from the latent itself. In one that adds noise it keeps its stock meaning.

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
        self.walk, self.level, self.uuid = SourceWalk(share), None, uuid.uuid4()

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
        places, clips = EditPlaces(), clips_in(len(noise), executor.class_obj.model_options["transformer_options"])
        if self.subject is not None:
            masks = _videos(at_size(self.subject, noise), clips).split(1)
            of_clip = partial(EditPlaces.of, self.region, margin=1, steady=self.steady)
            places = EditPlaces.together([of_clip(mask) for mask in masks])
        if denoise_mask is not None and not noise.any():
            mask = _videos(noise_mask(denoise_mask, noise).expand(len(noise), -1, -1, -1), clips)
            changeable = mask if places.changeable is None else mask * places.changeable
            places, denoise_mask = replace(places, changeable=changeable), None
        self.walk.begin(places)
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)

    def calculate(
        self, executor: Callable, model: BaseModel, conds: list, x: Tensor, timestep: Tensor, model_options: dict
    ) -> list[Tensor]:
        """Wraps what the core does at a noise level: it calls the MODEL for some prompts, or for parts of the frames
        that prompts are for, and puts together what comes out, `f c h w` for each list of prompts.

        Raises:
            TavError: Context Windows of the core, or another pack's tiles.
        """
        options = model_options["transformer_options"]
        if "context_window" in options:  # of the core: it doesn't say what it makes of the clip's other frames
            problem = (
                "comes through Attention Injection (a noise mask in Video Sampler needs it too) and through Context "
                "Windows of ComfyUI itself, which don't go together"
            )
            raise TavError("MODEL", None, problem, "use Context Windows (Tune-A-Video)")
        walk, sigma, sigmas, clips = self.walk, timestep[0], options["sample_sigmas"], clips_in(len(x), options)
        if not walk.walks(sigma, sigmas):
            return executor(model, conds, x, timestep, model_options)
        source, (leads, anchor) = _frames(walk.source(_videos(x, clips), sigma)), walk.leading(sigma, sigmas)
        parts = {cond["uuid"]: Part.of(cond, x, timestep) for prompts in conds for cond in prompts or []}
        anchor = None if anchor is None else _frames(anchor.to(x)).expand(len(x), -1, -1, -1)
        self.level = Level(source, self.vector(x), leads, anchor, parts, walk.is_new(sigma))
        try:
            out, x0 = executor(model, conds, x, timestep, model_options), self.level.x0
        finally:
            self.level = None
        if walk.is_new(sigma):
            if x0 is None:  # no call had all of the frames and the MODEL's own weights
                (x0,) = executor(model, [[self.cond(x)]], source, timestep, model_options)
            walk.advance(_videos(source, clips), _videos(x0, clips), sigma)
        return [y if cond is None else _frames(walk.kept(_videos(y, clips), sigmas)) for y, cond in zip(out, conds)]

    def cond(self, x: Tensor) -> dict[str, Any]:
        """What the clip was inverted with, for latents `f c h w`, as samplers have it."""
        conds, vector = {"c_crossattn": CONDCrossAttn(self.text.to(x))}, self.vector(x)
        if vector is not None:
            conds["y"] = CONDRegular(vector.to(x))
        return {"model_conds": conds, "uuid": self.uuid}

    def __call__(self, apply_model: Callable, args: dict[str, Any]) -> Tensor:
        level = self.level
        if level is None:
            return self.ask(apply_model, args)
        parts = [level.parts.get(prompt, Part()) for prompt in args["c"]["transformer_options"]["uuids"]]
        begins = level.begins and level.x0 is None and all(part.is_plain for part in parts)
        if not level.leads and not begins:
            return self.ask(apply_model, args)
        areas = [part.area for part in parts]
        if areas.count(areas[0]) == len(areas):  # one clip leads them all
            areas = areas[:1]
        source = torch.cat([cropped(level.source, area) for area in areas]).to(args["input"])  # of several GPUs one
        if source.shape[1:] != args["input"].shape[1:]:
            problem = "is called for parts of the frames by another pack, of which Attention Injection can't know"
            raise TavError("MODEL", None, problem, "leave out what divides them into tiles")
        out = self.ask(apply_model, self.beside(args, source, areas, any(part.boxes for part in parts)))
        if begins:
            level.x0 = out[: len(source)].to(level.source)
        return out[len(source) :]

    def ask(self, apply_model: Callable, args: dict[str, Any]) -> Tensor:
        if self.inner:
            return self.inner(apply_model, args)
        return apply_model(args["input"], args["timestep"], **args["c"])

    def beside(self, args: dict[str, Any], source: Tensor, areas: list, boxes: bool) -> dict[str, Any]:
        """The arguments of a call in which the clip's own frames stand in front, with what it was inverted with.

        Args:
            source: the frames, once for all prompts of the call or once for each, `(areas f) c h w`.
            areas: what they are of the clip.
            boxes: whether the last of its middle patches is of GLIGEN, for the prompts' own rows.
        """
        level, c, x, rows = self.level, dict(args["c"]), args["input"], len(source)
        kinds = [*(1 for _ in areas), *args["cond_or_uncond"]]
        text = CONDCrossAttn(comfy.utils.repeat_to_batch_size(self.text.to(x), rows))
        c["c_crossattn"] = text.concat([CONDCrossAttn(c["c_crossattn"].to(x))])  # so far it is where CLIP left it
        if "y" in c:
            vector = comfy.utils.repeat_to_batch_size(level.vector.to(c["y"]), rows)
            c["y"] = torch.cat([vector, c["y"]])
        if c.get("control"):  # the clip itself is under no ControlNet
            c["control"] = {
                place: [_led_by_none(residual, rows, len(x)) for residual in entries]
                for place, entries in c["control"].items()
            }
        options = c["transformer_options"]
        uuids = [*(self.uuid for _ in areas), *options["uuids"]]
        options = {**options, "cond_or_uncond": kinds, "uuids": uuids, SOURCE_ROWS: rows if level.leads else 0}
        if level.anchor is not None:
            anchor = torch.cat([cropped(level.anchor, area) for area in areas]).to(x)
            options[ANCHOR] = anchor.repeat(1 + len(x) // rows, 1, 1, 1)
        if boxes:
            *others, last = options["patches"]["middle_patch"]
            options["patches"] = {**options["patches"], "middle_patch": [*others, partial(_behind, last, rows)]}
        c["transformer_options"] = options
        timestep = args["timestep"][:1].expand(rows)
        return {**args, "input": torch.cat([source, x]), "c": c, "cond_or_uncond": kinds,
                "timestep": torch.cat([timestep, args["timestep"]])}  # fmt: skip

    def __deepcopy__(self, memo: dict) -> "Injection":
        """Itself: clones of a MODEL, whose options older cores copy deeply, keep `sample` as well, which goes on with
        this.
        """
        return self


Area = tuple[int, int, int, int]  # height, width, top and left in latents, as in the core


@dataclass(frozen=True)
class Part:
    """What a prompt is for.

    Attributes:
        area: of the frames; None: all of them.
        hooked: whether the MODEL has other weights meanwhile.
        boxes: whether GLIGEN has its say.
    """

    area: Area | None = None
    hooked: bool = False
    boxes: bool = False

    @classmethod
    def of(cls, cond: dict[str, Any], x: Tensor, timestep: Tensor) -> "Part":
        """That of a prompt as samplers have it, on latents `f c h w`."""
        area = None
        if "area" in cond:
            asked = {"area": cond["area"], "model_conds": {}, "uuid": None}
            area = tuple(comfy.samplers.get_area_and_mult(asked, x, timestep).area)
        return cls(area, cond.get("hooks") is not None, "gligen" in cond)

    @property
    def is_plain(self) -> bool:
        return self.area is None and not self.hooked


@dataclass
class Level:
    """A noise level at which the clip is needed, while the core calls the MODEL.

    Attributes:
        source: the clip, `f c h w`.
        vector: the rest of what it was inverted with, where the MODEL is SDXL.
        leads: whether it leads.
        anchor: where its features lead as well, `f 1 h w`; None: nowhere.
        parts: what the prompts are for, by their uuids.
        begins: whether the walk has yet to come here; the first call with all of the frames takes it.
        x0: the clip's clean latents, from that call.
    """

    source: Tensor
    vector: Tensor | None
    leads: bool
    anchor: Tensor | None
    parts: dict[Any, Part]
    begins: bool
    x0: Tensor | None = None


def cropped(x: Tensor, area: Area | None) -> Tensor:
    """An area of latents `f c h w`."""
    if area is None:
        return x
    height, width, top, left = area
    return x[..., top : top + height, left : left + width]


def clips_in(frames: int, options: dict[str, Any]) -> int:
    """How many clips of the tuned length so many frames are, one behind the other; through windows they are one."""
    tuned = options.get(FRAMES, frames)
    return 1 if WINDOWS in options or frames % tuned else frames // tuned


def _videos(x: Tensor, clips: int) -> Tensor:
    return rearrange(x, "(k f) c h w -> k c f h w", k=clips)


def _frames(videos: Tensor) -> Tensor:
    return rearrange(videos, "k c f h w -> (k f) c h w")


def _behind(patch: Callable, rows: int, x: Tensor, extra: dict[str, Any]) -> Tensor:
    """A middle patch on all but the first rows."""
    return torch.cat([x[:rows], patch(x[rows:], extra)])


def _led_by_none(residual: Tensor | None, rows: int, others: int) -> Tensor | None:
    """A ControlNet's residual for `others`, of which a T2I-Adapter has but one for one hint, behind none for the first
    rows.
    """
    if residual is None:
        return None
    residual = residual.expand(others, *residual.shape[1:]) if len(residual) == 1 else residual
    return torch.cat([residual.new_zeros(rows, *residual.shape[1:]), residual])


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


def with_counted_inputs(sample: Callable) -> Callable:
    """`CFGGuider.sample`, in which an `Injection` refuses noise masks of another number of frames, and an inflated
    MODEL hints that are lost in windows.

    The core repeats or cuts them, in newer cores before any wrapper of the MODEL is called: here alone they can be
    counted.
    """

    @wraps(sample)
    def checked(guider, noise, latent_image, sampler, sigmas, denoise_mask=None, *args, **kwargs):
        if denoise_mask is not None and has_injection(guider.model_patcher) and not noise.any():
            _check_count("noise_mask", denoise_mask[..., 0, 0].numel(), len(latent_image))
        if isinstance(guider.model_patcher.model.diffusion_model, VideoUNet):
            check_hints_in_windows(guider, len(latent_image))
        return sample(guider, noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)

    return checked


comfy.samplers.CFGGuider.sample = with_counted_inputs(comfy.samplers.CFGGuider.sample)


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
        TavError: it isn't inflated, or the CONDITIONING isn't for it or not for all of the clip.
    """
    video_unet(model)  # raises for a model that isn't inflated
    text = hidden_states(model, conditioning, "conditioning")
    check_unlimited(conditioning, "conditioning")
    model = without_injection(model)
    inner = model.model_options.get(WRAPPER)
    model = model.clone()
    injection = Injection(text, partial(vector_of, model, conditioning), share, subject, region, steady, inner)
    model.set_model_unet_function_wrapper(injection)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER, injection.sample)
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, WRAPPER, injection.calculate)
    return model


def has_injection(model: ModelPatcher) -> bool:
    return isinstance(model.model_options.get(WRAPPER), Injection)


def without_injection(model: ModelPatcher) -> ModelPatcher:
    """The MODEL without `Injection`, for inverting with it."""
    if not has_injection(model):
        return model
    injection, model = model.model_options[WRAPPER], model.clone()
    del model.model_options[WRAPPER]
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.CALC_COND_BATCH):
        model.remove_wrappers_with_key(kind, WRAPPER)
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
                               tooltip="What the edit may change; all but everything needs the mask. subject: its "
                                       "colour or material. shape: another thing in its place, the same in all "
                                       "frames. The rest is what the noise reconstructs of the clip."),
                io.Boolean.Input("steady", default=True,
                                 tooltip="With the mask: a background that the edit draws anew stands still where the "
                                         "clip's does. An edited subject is the same in all frames. Turn it off for "
                                         "what should move otherwise, such as a fire or a crowd."),
                io.Mask.Input("subject", optional=True,
                              tooltip="Where the subject is, a mask for each frame or one for all: from Subject Mask, "
                                      "or of any other node. It is kept in its place."),
            ],
            outputs=[io.Model.Output(tooltip="For a sampler with add_noise disabled. A sampling step takes half as "
                                             "long again.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, share=None, region=None) -> bool | str:
        return told(cls, share=share, region=region)

    @classmethod
    @checked
    def execute(cls, model, conditioning, share, region="everything", steady=True, subject=None) -> io.NodeOutput:
        with plain_errors(attention_injection="share"):
            if region != "everything" and subject is None:
                remedy = f"connect {field('subject')} to Subject Mask"
                raise TavError("region", region, "needs to know where the subject is", remedy)
            model = with_injection(model, conditioning, share, region, subject, steady)
        return io.NodeOutput(model)
