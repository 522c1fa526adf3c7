"""One-Shot Tune: fits an inflated MODEL to one clip and its sentence."""

import dataclasses
import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from ..tav_core import (
    Condition,
    Note,
    Take,
    TavError,
    TuneConfig,
    TuneResult,
    VideoUNet,
    base_fingerprint,
    ddim_invert,
    ddim_sample,
    loss_curve,
    strip,
    tune,
)
from ..tav_core.events import Event
from ..tav_core.memory import Device
from ..tav_core.objective import TIMESTEP_SAMPLINGS
from ..tav_core.precision import DTYPES
from ..tav_core.recompute import MEMORY_OR_AUTO
from ..tav_core.tuned_weights import tuned_info
from ..tav_core.tuning_state import read_state
from .common import (
    NodeTakes,
    NodeTunedWeights,
    TunedWeights,
    check_unlimited,
    clean_latents,
    from_images,
    hidden_states,
    image_of,
    progress_bar,
    report,
    schema,
    show,
)
from .errors import plain_errors
from .folders import listed
from .inputs import checked, told, usable
from .native import WINDOWS, scheduler_of, trainable_copy, video_unet, with_tuned_weights
from .sdxl import vector_of

KEPT_STATES = 4  # runs that can be resumed, at least; for SD 1.5 a state takes 0.9 GB
KEPT_SHARE = 0.1  # of the free disk, that more of them may take
PREVIEW_STEPS, PREVIEW_GUIDANCE = 10, 5.0


class OneShotTune(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TAVOneShotTune",
            display_name="One-Shot Tune (Tune-A-Video)",
            description="Teaches an inflated MODEL one clip: only some attention projections change. Cancel whenever "
                        "you like and queue again: it goes on where it stopped. A run that was finished once is not "
                        "trained again.",
            search_aliases=["train", "fine-tune video", "tune a video"],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,  # the loss curve stays in the node, also after a cached run
            advanced=("dtype", "memory", "timestep_sampling", "save_every", "weight_average", "keep"),
            inputs=[
                io.Model.Input("model", tooltip="From Inflate."),
                io.Latent.Input("latent", tooltip="The clip, from VAE Encode: its frames are the batch."),
                io.Conditioning.Input("positive",
                                      tooltip="One sentence that describes the clip, from CLIP Text Encode."),
                io.Int.Input("steps", default=500, min=1, max=100_000,
                             tooltip="The paper: 300 to 500 on SD 1.5. 200 suit the mini checkpoint. A larger number "
                                     "goes on from a shorter run."),
                io.Float.Input("learning_rate", default=3e-5, min=1e-7, max=1.0, step=1e-7, round=1e-8,
                               tooltip="The paper: 0.00003. The mini checkpoint wants 0.002."),
                # a seed that changes after each run, as the frontend gives it by default, would train each time
                io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=False,
                             tooltip="Of noise and timesteps; the same seed gives the same weights."),
                io.Combo.Input("dtype", display_name="Precision (dtype)", options=["auto", *DTYPES], default="auto",
                               tooltip="Precision of the computation; auto is bf16 where the GPU has it, else fp32. "
                                       "What is tuned stays in fp32."),
                io.Combo.Input("memory", options=list(MEMORY_OR_AUTO), default="auto",
                               tooltip="fast takes the most memory; selective a third less, and a tenth longer; "
                                       "checkpointing much less, and a third to a half longer; low the least, and "
                                       "about twice as long. auto is the first that fits. All give the same weights, "
                                       "to rounding."),
                io.Combo.Input("timestep_sampling", options=list(TIMESTEP_SAMPLINGS), default="uniform",
                               tooltip="uniform as in the paper; stratified covers all noise levels evenly, better "
                                       "for short runs."),
                io.Int.Input("preview_every", default=0, min=0, max=10_000,
                             tooltip="Shows the clip as preview_prompt draws it after every so many steps; 0 does "
                                     "not."),
                io.Conditioning.Input("preview_prompt", optional=True,
                                      tooltip="The edit to preview; without it the clip itself."),
                io.Vae.Input("vae", display_name="VAE", optional=True,
                             tooltip="Decodes the preview; without it the preview is a rough one."),
                NodeTakes.Input("takes", optional=True,
                                tooltip="Further clips to learn from, each with its sentence, from Take."),
                io.Float.Input("save_every", display_name="Save every (minutes)", optional=True, default=2.0, min=0.0,
                               max=1440.0, step=0.5,
                               tooltip="What was learned is kept after so many minutes, and after every 100 steps, in "
                                       "case ComfyUI or the machine fails. 0: after every step."),
                io.Float.Input("weight_average", optional=True, default=0.0, min=0.0, max=0.9999, step=0.01, round=1e-4,
                               tooltip="Decay of a running average of the weights, such as 0.96, which is taken in "
                                       "their place: less hangs on the chance of the last steps. 0, as in the paper, "
                                       "takes none."),
                io.String.Input("keep", display_name="Keep steps", optional=True, default="",
                                tooltip="Steps whose weights are kept as well, such as 100, 200, 300: too many steps "
                                        "make edits stiff, so look with Apply Tuned Weights, and choose."),
            ],
            outputs=[
                io.Model.Output(tooltip="The tuned MODEL, for DDIM Inversion and every sampler."),
                NodeTunedWeights.Output(display_name="tuned_weights", tooltip="For Save Tuned Weights."),
                io.Image.Output(display_name="loss_curve", tooltip="The loss of every step and on fixed draws."),
                io.String.Output(display_name="losses", tooltip="The same as JSON."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(
        cls,
        learning_rate=None,
        dtype=None,
        memory=None,
        timestep_sampling=None,
        save_every=None,
        weight_average=None,
        keep=None,
    ) -> bool | str:
        given = dict(learning_rate=learning_rate, dtype=dtype, memory=memory, timestep_sampling=timestep_sampling)
        wrong = told(cls, **given, save_every=save_every, weight_average=weight_average, keep=keep)
        return usable(steps_of, keep) if wrong is True else wrong

    @classmethod
    @checked
    def execute(
        cls,
        model,
        latent,
        positive,
        steps,
        learning_rate,
        seed,
        dtype,
        memory,
        timestep_sampling,
        preview_every,
        preview_prompt=None,
        vae=None,
        takes=(),
        save_every=2.0,
        weight_average=0.0,
        keep="",
    ) -> io.NodeOutput:
        with plain_errors(save_minutes="save_every", context_length="Context Windows (Tune-A-Video)"):
            if dtype == "auto":
                bf16 = comfy.model_management.should_use_bf16(comfy.model_management.get_torch_device())
                dtype = "bf16" if bf16 else "fp32"
            # of Context Windows; 0 are windows of the tuned length, to be used on longer clips than this one
            length, _ = model.model_options["transformer_options"].get(WINDOWS, (0, 0))
            config = TuneConfig(
                steps=steps,
                learning_rate=learning_rate,
                seed=seed,
                dtype=dtype,
                memory=memory,
                timestep_sampling=timestep_sampling,
                save_minutes=save_every,
                context_length=length or None,
                weight_average=weight_average,
                keep=steps_of(keep),
            )
            clips = [(latent, positive, "positive")]
            clips += [
                (clip, sentence, f"positive of take {number}") for number, (clip, sentence) in enumerate(takes, 2)
            ]
            taken = [take_of(model, *clip) for clip in clips]
            edit = take_of(model, latent, preview_prompt or positive, "preview_prompt").condition
            tuned, result = run(cls, model, taken, config, preview_every, edit, vae)
        curve = image_of(loss_curve(result.losses, result.probe_losses))
        losses = json.dumps({"losses": result.losses, "probe_losses": result.probe_losses})
        return io.NodeOutput(
            with_tuned_weights(model, tuned.tensors, tuned.info.num_frames),
            tuned,
            curve,
            losses,
            ui=ui.PreviewImage(curve, cls=cls),
        )


def steps_of(text: str) -> list[int]:
    """The steps that a text lists.

    Raises:
        TavError: it is no list of them.
    """
    words = re.split(r"[\s,;]+", text.strip(" \n\t,;"))
    if not re.fullmatch(r"[\d\s,;]*", text, re.ASCII) or max(map(len, words)) > 6:
        raise TavError("keep", text[:100], "is no list of steps", "write it like 100, 200, 300")
    return [int(word) for word in words if word]


def take_of(model: ModelPatcher, latent: dict, conditioning: list, field: str) -> Take:
    """A LATENT and a CONDITIONING as `trainable_copy` learns from them."""
    latents, text = clean_latents(model, latent), hidden_states(model, conditioning, field)
    check_unlimited(conditioning, field)
    return Take(latents, Condition(text, vector_of(model, conditioning, latents)))


def copied(condition: Condition) -> Condition:
    return Condition(*(None if each is None else each.clone() for each in vars(condition).values()))


class Trainee(nn.Module):
    """Holds the U-Net, so that ComfyUI's memory management can put its marks on something else."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet


class ComfyDevice(Device):
    """The device of ComfyUI, which moves models away to make room for the one that is tuned and its steps."""

    def __init__(self, unet: nn.Module, others: list[ModelPatcher]):
        super().__init__(comfy.model_management.get_torch_device())
        offload = comfy.model_management.unet_offload_device()
        self.patchers = [ModelPatcher(Trainee(unet), load_device=self.device, offload_device=offload), *others]

    def make_room(self, needed: Callable[[], int]):
        comfy.model_management.load_models_gpu(self.patchers, memory_required=needed(), force_full_load=True)


def run(
    node,
    model: ModelPatcher,
    takes: list[Take],
    config: TuneConfig,
    preview_every: int,
    edit: Condition,
    vae: comfy.sd.VAE | None,
) -> tuple[TunedWeights, TuneResult]:
    """Tunes a copy of the U-Net on the takes, on the device and in the memory that ComfyUI gives it.

    Args:
        edit: what the preview shows of the first take.
    """
    scheduler = scheduler_of(model)
    with torch.inference_mode(False):  # which nodes run under
        unet = trainable_copy(model)
        # clones, because tensors that were made under it know no gradients
        takes, edit = [Take(take.latents.clone(), copied(take.condition)) for take in takes], copied(edit)
        _, _, length, height, width = takes[0].latents.shape
        base, frames = base_fingerprint(unet), config.context_length or length
        device = ComfyDevice(unet, [vae.patcher] if preview_every and vae is not None else [])
        shown = torch.arange(frames)

        def picture() -> Image.Image:
            first = takes[0].to(device.device).at(shown)
            wish = edit.to(device.device).at(1, length, shown)
            return preview(model, unet, scheduler, first, wish, vae)

        on_event = Reporter(node, config.steps, preview_every, picture)
        result = tune(
            unet,
            scheduler,
            takes,
            config,
            state_path=lambda fingerprint: state_path(base, fingerprint, config),
            device=device,
            callback=on_event,
        )
        if result.started == config.steps:
            report(node, f"tuned before, {result.steps} steps, loss {result.probe_losses[-1][1]:.4f}")
        settings, inflation = dataclasses.asdict(config), video_unet(model).inflation
        info = tuned_info(base, inflation, prompt="", num_frames=frames, width=8 * width, height=8 * height,
                          config=settings, base_name="")  # fmt: skip
    return TunedWeights(result.weights, info, result.kept, model), result


class Reporter:
    """Shows the events of a tuning in its node: progress, a line, previews; and stops it when the user cancels."""

    def __init__(self, node, total: int, preview_every: int, picture: Callable[[], Image.Image]):
        self.node, self.preview_every, self.picture = node, preview_every, picture
        self.bar, self.told = progress_bar(total), time.monotonic()

    def __call__(self, event: Event):
        if isinstance(event, Note):
            logging.info(f"Tune-A-Video: {event.text}")
            report(self.node, event.text)
            return
        comfy.model_management.throw_exception_if_processing_interrupted()
        step, total, last = event.step, event.total, event.step == event.total
        if self.preview_every and (step % self.preview_every == 0 or last):
            show(self.node, self.picture())
        self.bar.update_absolute(step, total)
        if time.monotonic() - self.told > 0.5 or last:
            self.told = time.monotonic()
            left = event.seconds / (step - event.started) * (total - step)
            time_left = f"{left // 60:.0f}:{left % 60:02.0f} left"
            report(self.node, f"step {step}/{total}, loss {event.probe_loss:.4f}, {time_left}")


def state_path(base: str, fingerprint: dict, config: TuneConfig) -> Path:
    """Where the run of that fingerprint keeps its state. Where there are more than `KEPT_STATES`, and no room for them,
    the oldest go.

    Raises:
        TavError: there can't be such a folder.
    """
    folder = Path(folder_paths.get_user_directory()) / "tune_a_video"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"can't be made ({error.strerror}), in which an unfinished tuning is kept"
        raise TavError("folder", folder, problem, "make its parent one that ComfyUI may write to") from error
    key = hashlib.sha256(json.dumps([base, fingerprint], sort_keys=True).encode()).hexdigest()[:20]
    path = folder / f"{key}.safetensors"
    if path.exists():
        path.touch()
        state = read_state(path)[0]
        lost = any(step <= state.step and step not in state.kept for step in config.keep)
        if lost or state.step > config.steps:  # this one needs steps that it has not, or ends earlier
            path = folder / f"{'-'.join(map(str, [key, *sorted(config.keep), config.steps]))}.safetensors"
    others = [folder / name for name in listed(folder)[0] if name.endswith(".safetensors") and name != path.name]
    room, taken = KEPT_SHARE * shutil.disk_usage(folder).free, 0
    for number, old in enumerate(sorted(others, key=lambda p: p.stat().st_mtime, reverse=True), 2):
        taken += old.stat().st_size
        if number > KEPT_STATES and taken > room:
            old.unlink()
    return path


def preview(model: ModelPatcher, unet: VideoUNet, scheduler, take: Take, edit: Condition, vae) -> Image.Image:
    """A strip of the clip as `edit` draws it now: inverted under its own sentence, led away from it."""
    noise = ddim_invert(unet, take.latents, take.condition, scheduler, PREVIEW_STEPS)
    video = ddim_sample(
        unet,
        noise,
        edit,
        scheduler,
        PREVIEW_STEPS,
        guidance_scale=PREVIEW_GUIDANCE,
        negative_hidden_states=take.condition,
    )
    frames = rearrange(video, "1 c f h w -> f c h w")
    if vae is None:
        return strip([from_images(rough_pictures(model.model.latent_format, frames))], [""])
    # not vae.decode: that would make room for itself, by unloading what is being tuned
    frames = model.model.process_latent_out(frames).to(vae.device, vae.vae_dtype)
    pixels = torch.cat([vae.process_output(vae.first_stage_model.decode(frame[None]).float()) for frame in frames])
    return strip([from_images(pixels.movedim(1, -1))], ["preview"])


def rough_pictures(latent_format: Any, latents: Tensor) -> Tensor:
    """Latents `f c h w` as samplers preview them, IMAGE at the size of the frames."""
    if latent_format.latent_rgb_factors_reshape is not None:
        latents = latent_format.latent_rgb_factors_reshape(latents)
    factors = torch.tensor(latent_format.latent_rgb_factors, device=latents.device)
    bias = torch.tensor(getattr(latent_format, "latent_rgb_factors_bias", None) or [0.0] * 3, device=latents.device)
    pictures = (torch.einsum("f c h w, c r -> f h w r", latents.float(), factors) + bias + 1) / 2
    return pictures.clamp(0, 1).repeat_interleave(8, 1).repeat_interleave(8, 2)
