"""Tune-A-Video (Wu et al., ICCV 2023, arXiv 2212.11565): one-shot tuning of image diffusion models for video editing.

An image diffusion model is inflated to video and tuned on one clip and its sentence. The clip is inverted to noise that
carries its motion, and from this noise other sentences are sampled:

    import tav_core as tav

    checkpoint = tav.load_checkpoint("mini")
    clip = tav.load_video("clip.mp4", count=8, width=checkpoint.size, height=checkpoint.size)
    preset = tav.PRESETS["mini"]
    source = tav.prepare(checkpoint, clip.frames, "a red ball is sliding on the grass")
    progress = tav.Progress()
    unet, result = tav.tune_on(checkpoint, [source], preset, callback=progress)
    noise = tav.invert(checkpoint, unet, source, preset, callback=progress)
    sentence = "a blue ball is sliding on the sand"
    edit = tav.sample(checkpoint, unet, noise, sentence, preset, source_prompt=source.prompt, callback=progress)
    tav.save_video(edit, "edit.mp4", clip.fps)

Frames are uint8 tensors `f h w c` (frames, height, width, colours), and may be given as arrays or images of Pillow as
well; latents, noise and masks are floats `b c f h w`
(videos, channels, frames, height, width). What a caller can put right raises `TavError`.
"""

import importlib.metadata
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import *  # noqa: F403
# ruff: noqa: F405

__all__ = [
    "PRESETS", "REGIONS", "Callback", "Cancelled", "Checkpoint", "Clip", "Condition", "ContextWindows", "Control",
    "DDIMStep", "Device", "Edit", "EditJob", "EditPlaces", "InvertedNoise", "Note", "OutOfMemory", "Plan", "Preset",
    "Progress", "Reading", "Sound", "Source", "SourceWalk", "Stage", "Step", "Take", "TavError", "TuneConfig",
    "TuneResult", "TunedInfo", "TuningStep", "VideoModel", "VideoUNet", "WindowedUNet", "base_fingerprint",
    "ddim_invert", "ddim_sample", "ddim_timesteps", "decode_video", "encode_prompt", "encode_video", "find_subject",
    "inflate", "invert", "load_checkpoint", "load_controlnet", "load_embedding", "load_lora", "load_tuned",
    "load_video", "loss_curve", "prepare", "read_noise", "read_tuned", "reconstruct", "run_edit", "sample",
    "sample_edits", "save_noise", "save_pipeline", "save_tuned", "save_video", "side_by_side", "strip", "subject_mask",
    "to_frames", "to_pixels", "trainable_parameters", "tune", "tune_on", "tuning_loss", "with_settings", "word_mask",
    "word_places",
]  # fmt: skip


def _version() -> str:
    """The version stands in pyproject.toml alone: a checkout has that file, an installation what pip kept of it."""
    name, pyproject = "comfyui-tune-a-video", Path(__file__).parents[1] / "pyproject.toml"
    if pyproject.is_file():
        found = re.search(rf'^name = "{name}"$.*?^version = "(.+?)"$', pyproject.read_text("utf-8"), re.M | re.S)
        if found:
            return found[1]
    return importlib.metadata.version(name)


__version__ = _version()


def __getattr__(name: str) -> Any:
    """Public names come, all at once, when the first is asked for: with torch and diffusers, which take seconds.

    So the command line can be stopped, and says so, from its first moment on.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    api = importlib.import_module(".api", __name__)
    globals().update({public: getattr(api, public) for public in __all__})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
