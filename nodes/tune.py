"""One-Shot Tune: fits an inflated MODEL to one clip and its sentence."""

import dataclasses
import hashlib
import json
import logging
import time
from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui
from einops import rearrange
from torch import Tensor, nn

from ..tav_core import TuneConfig, TuneResult, base_fingerprint, ddim_invert, ddim_sample, loss_curve, strip, tune
from ..tav_core.condition import at_frames
from ..tav_core.recompute import MEMORY
from ..tav_core.tuned_weights import tuned_info
from ..tav_core.tuning import DTYPES, Take, run_fingerprint, step_memory
from ..tav_core.tuning_state import read_state
from .common import (
    NodeTakes,
    NodeTunedWeights,
    TunedWeights,
    clean_latents,
    from_images,
    hidden_states,
    image_of,
    plain_errors,
    progress_bar,
    report,
    schema,
    show,
)
from .native import WINDOWS, scheduler_of, trainable_copy, video_unet, with_tuned_weights
from .sdxl import packed, vector_of

KEPT_STATES = 4  # runs that can be resumed; for SD 1.5 a state takes 0.9 GB
PREVIEW_STEPS, PREVIEW_GUIDANCE = 10, 5.0


class OneShotTune(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TAVOneShotTune",
            display_name="One-Shot Tune (Tune-A-Video)",
            description="Teaches an inflated MODEL one clip: only some attention projections change. Cancel whenever you "
            "like and queue again: it goes on where it stopped. A run that was finished once is not trained again.",
            search_aliases=["train", "fine-tune video", "tune a video"],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,  # the loss curve stays in the node, also after a cached run
            advanced=("dtype", "memory", "timestep_sampling"),
            inputs=[
                io.Model.Input("model", tooltip="From Inflate."),
                io.Latent.Input("latent", tooltip="The clip, from VAE Encode: its frames are the batch."),
                io.Conditioning.Input("positive", tooltip="One sentence that describes the clip, from CLIP Text Encode."),
                io.Int.Input("steps", default=500, min=1, max=100_000,
                             tooltip="The paper: 300 to 500 on SD 1.5. 200 suit the mini checkpoint. A larger number goes on "
                             "from a shorter run."),
                io.Float.Input("learning_rate", default=3e-5, min=1e-7, max=1.0, step=1e-7, round=1e-8,
                               tooltip="The paper: 0.00003. The mini checkpoint wants 0.002."),
                # a seed that changes after each run, as the frontend gives it by default, would train each time
                io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=False,
                             tooltip="Of noise and timesteps; the same seed gives the same weights."),
                io.Combo.Input("dtype", display_name="Precision (dtype)", options=["auto", *DTYPES], default="auto",
                               tooltip="Precision of the computation; auto is bf16 where the GPU has it, else fp32. What is "
                               "tuned stays in fp32."),
                io.Combo.Input("memory", options=["auto", *MEMORY], default="auto",
                               tooltip="fast takes the most memory; selective a third less, and a tenth longer; checkpointing much less, "
                               "and a third to a half longer; low the least, and about twice as long. auto is the first that fits. All give the same weights, to rounding."),
                io.Combo.Input("timestep_sampling", options=["uniform", "stratified"], default="uniform",
                               tooltip="uniform as in the paper; stratified covers all noise levels evenly, better for short runs."),
                io.Int.Input("preview_every", default=0, min=0, max=10_000,
                             tooltip="Shows the clip as preview_prompt draws it after every so many steps; 0 does not."),
                io.Conditioning.Input("preview_prompt", optional=True,
                                      tooltip="The edit to preview; without it the clip itself."),
                io.Vae.Input("vae", display_name="VAE", optional=True, tooltip="Decodes the preview; without it the preview is a rough one."),
                NodeTakes.Input("takes", optional=True, tooltip="Further clips to learn from, each with its sentence, from Take."),
            ],
            outputs=[
                io.Model.Output(tooltip="The tuned MODEL, for DDIM Inversion and every sampler."),
                NodeTunedWeights.Output(display_name="tuned_weights", tooltip="For Save Tuned Weights."),
                io.Image.Output(display_name="loss_curve", tooltip="The loss of every step and on fixed draws."),
                io.String.Output(display_name="losses", tooltip="The same as JSON."),
            ],
        )  # fmt: skip

    @classmethod
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
    ) -> io.NodeOutput:
        with plain_errors():
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
                context_length=length or None,
            )
            latents = clean_latents(model, latent)
            text = conditions(model, positive, latents, "positive")
            edit = conditions(model, preview_prompt, latents, "preview_prompt") if preview_prompt else text
            all_takes = [Take(latents, text)]
            for number, (more, said) in enumerate(takes, 2):
                more = clean_latents(model, more)
                all_takes.append(Take(more, conditions(model, said, more, f"positive of take {number}")))
            tuned, result = run(cls, model, all_takes, config, preview_every, edit, vae)
        curve = image_of(loss_curve(result.losses, result.probe_losses))
        losses = json.dumps({"losses": result.losses, "probe_losses": result.probe_losses})
        return io.NodeOutput(
            with_tuned_weights(model, tuned.tensors, tuned.info.num_frames),
            tuned,
            curve,
            losses,
            ui=ui.PreviewImage(curve, cls=cls),
        )


def conditions(model: ModelPatcher, conditioning: list, latents: Tensor, field: str) -> Tensor:
    """What `trainable_copy` takes as text."""
    text, vector = hidden_states(model, conditioning, field), vector_of(model, conditioning, latents)
    return text if vector is None else packed(text, vector)


class Trainee(nn.Module):
    """Holds the U-Net, so that ComfyUI's memory management can put its marks on something else."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet


def run(
    node, model: ModelPatcher, takes: list[Take], config: TuneConfig, preview_every: int, edit: Tensor, vae
) -> tuple[TunedWeights, TuneResult]:
    """Tunes a copy of the U-Net on the takes, on the device and in the memory that ComfyUI gives it.

    The preview is of the first take.
    """
    management, device = comfy.model_management, comfy.model_management.get_torch_device()
    scheduler = scheduler_of(model)
    with torch.inference_mode(False):  # which nodes run under
        unet = trainable_copy(model)
        takes, edit = [Take(take.latents.clone(), take.encoder_hidden_states.clone()) for take in takes], edit.clone()
        (first, *more), latents = takes, takes[0].latents
        base = base_fingerprint(unet)
        state = state_path(base, run_fingerprint(unet, scheduler, takes, config), config.steps)

        patcher = ModelPatcher(Trainee(unet), load_device=device, offload_device=management.unet_offload_device())
        frames = config.context_length or latents.shape[2]
        best = MEMORY[0] if config.memory == "auto" else config.memory  # auto takes the best that what it gets allows
        room = step_memory(unet, takes, config, best, device)
        with_vae = [vae.patcher] if preview_every and vae is not None else []
        management.load_models_gpu([patcher, *with_vae], memory_required=room, force_full_load=True)
        bar, said = progress_bar(config.steps), time.monotonic()

        def on_step(progress: dict):
            nonlocal said
            management.throw_exception_if_processing_interrupted()
            step, total = progress["step"], progress["total"]
            if preview_every and (step % preview_every == 0 or step == total):
                beginning = torch.arange(frames)
                shown = first.to(device).at(beginning)
                wish = at_frames("preview_prompt", edit.to(device), 1, latents.shape[2], beginning)
                show(node, preview(model, unet, scheduler, shown.latents, shown.encoder_hidden_states, wish, vae))
            bar.update_absolute(step, total)
            if time.monotonic() - said > 0.5 or step == total:
                said = time.monotonic()
                done = step - started
                left = progress["seconds"] / max(1, done) * (total - step)
                report(
                    node,
                    f"step {step}/{total}, loss {progress['probe_loss']:.4f}, {left // 60:.0f}:{left % 60:02.0f} left",
                )

        def say(line: str):
            logging.info(f"Tune-A-Video: {line}")
            report(node, line)

        started = read_state(state)[0].step if state.exists() else 0
        result = tune(
            unet,
            scheduler,
            latents,
            first.encoder_hidden_states,
            config,
            more_takes=more,
            state_path=state,
            callback=on_step,
            say=say,
        )
        if started == config.steps:
            report(node, f"tuned before, {started} steps, loss {result.probe_losses[-1][1]:.4f}")
        height, width = latents.shape[3:]
        info = tuned_info(
            base,
            video_unet(model).inflation,
            prompt="",
            num_frames=frames,
            width=8 * width,
            height=8 * height,
            config=dataclasses.asdict(config),
            base_name="",
        )
    return TunedWeights(result.weights, info), result


def state_path(base: str, fingerprint: dict, steps: int) -> Path:
    """Where the run of that fingerprint keeps its state. The oldest states go."""
    folder = Path(folder_paths.get_user_directory()) / "tune_a_video"
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(json.dumps([base, fingerprint], sort_keys=True).encode()).hexdigest()[:20]
    path = folder / f"{key}.safetensors"
    if path.exists() and read_state(path)[0].step > steps:  # a longer run: this one ends earlier
        path = folder / f"{key}-{steps}.safetensors"
    others = sorted(
        (p for p in folder.glob("*.safetensors") if p != path), key=lambda p: p.stat().st_mtime, reverse=True
    )
    for old in others[KEPT_STATES - 1 :]:
        old.unlink()
    return path


def preview(model: ModelPatcher, unet, scheduler, latents: Tensor, text: Tensor, edit: Tensor, vae):
    """The clip as `edit` draws it now, a PIL strip: inverted under its own sentence, led away from it."""
    noise = ddim_invert(unet, latents, text, scheduler, PREVIEW_STEPS)
    video = ddim_sample(
        unet, noise, edit, scheduler, PREVIEW_STEPS, guidance_scale=PREVIEW_GUIDANCE, negative_hidden_states=text
    )
    frames = rearrange(video, "1 c f h w -> f c h w")
    if vae is None:
        formats = model.model.latent_format
        if formats.latent_rgb_factors_reshape is not None:
            frames = formats.latent_rgb_factors_reshape(frames)
        factors = torch.tensor(formats.latent_rgb_factors, device=frames.device)
        bias = torch.tensor(getattr(formats, "latent_rgb_factors_bias", None) or [0.0, 0.0, 0.0], device=frames.device)
        pictures = (torch.einsum("f c h w, c r -> f h w r", frames.float(), factors) + bias + 1) / 2
        return strip([from_images(pictures.clamp(0, 1).repeat_interleave(8, 1).repeat_interleave(8, 2))], [""])
    # not vae.decode: that would make room for itself, by unloading what is being tuned
    frames = model.model.process_latent_out(frames).to(vae.device, vae.vae_dtype)
    pixels = torch.cat([vae.process_output(vae.first_stage_model.decode(frame[None]).float()) for frame in frames])
    return strip([from_images(pixels.movedim(1, -1))], ["preview"])
