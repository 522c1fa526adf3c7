"""Tune-A-Video (Wu et al., ICCV 2023, arXiv 2212.11565): one-shot tuning of image diffusion models for video editing.

An image diffusion model is inflated to video and tuned on one clip and its sentence. The clip is inverted to noise that
carries its motion, and from this noise other sentences are sampled:

    import tav_core as tav

    checkpoint = tav.load_checkpoint("mini")
    clip = tav.load_video("clip.mp4", count=8, width=checkpoint.size, height=checkpoint.size)
    preset = tav.PRESETS["mini"]
    source = tav.prepare(checkpoint, clip.frames, "a red ball is sliding on the grass")
    unet, result = tav.tune_on(checkpoint, [source], preset, callback=print)
    noise = tav.invert(checkpoint, unet, source, preset)
    sentence = "a blue ball is sliding on the sand"
    edit = tav.sample(checkpoint, unet, noise, sentence, preset, source_prompt=source.prompt)
    tav.save_video(edit, "edit.mp4", clip.fps, clip.sound)

Frames are uint8 tensors `f h w c` (frames, height, width, colours); latents, noise and masks are floats `b c f h w`
(videos, channels, frames, height, width). What a caller can put right raises `TavError`.
"""

import importlib.metadata
import re
from pathlib import Path

from .checkpoint import Checkpoint, decode_video, encode_prompt, encode_video, load_checkpoint, load_controlnet
from .condition import Condition, VideoModel
from .ddim import ddim_invert, ddim_sample, ddim_timesteps
from .errors import Cancelled, OutOfMemory, TavError
from .events import Callback, DDIMStep, Note, Reading, Step, TuningStep
from .inflation import VideoUNet, inflate
from .injection import REGIONS, EditPlaces, SourceWalk
from .job import Edit, EditJob, run_edit
from .memory import Device
from .noise import read_noise, read_pace, save_noise
from .pipeline import Source, find_subject, invert, prepare, sample, tune_on
from .presets import PRESETS, Preset, with_settings
from .sound import Sound
from .subject import subject_mask, word_mask, word_places
from .take import Take
from .trainable import trainable_parameters
from .tuned_weights import TunedInfo, base_fingerprint, load_tuned, read_tuned, save_tuned
from .tuning import TuneConfig, TuneResult, tune, tuning_loss
from .video import Clip, load_video, save_video, to_frames, to_pixels
from .visuals import loss_curve, side_by_side, strip
from .windows import ContextWindows, WindowedUNet

__all__ = [
    "PRESETS", "REGIONS", "Callback", "Cancelled", "Checkpoint", "Clip", "Condition", "ContextWindows",
    "DDIMStep", "Device", "Edit", "EditJob", "EditPlaces", "Note", "OutOfMemory", "Preset", "Reading",
    "Sound", "Source", "SourceWalk", "Step", "Take", "TavError", "TuneConfig", "TuneResult", "TunedInfo", "TuningStep",
    "VideoModel", "VideoUNet", "WindowedUNet", "base_fingerprint", "ddim_invert", "ddim_sample",
    "ddim_timesteps", "decode_video", "encode_prompt", "encode_video", "find_subject", "inflate", "invert",
    "load_checkpoint", "load_controlnet", "load_tuned", "load_video", "loss_curve", "prepare", "read_noise",
    "read_pace", "read_tuned", "run_edit", "sample", "save_noise", "save_tuned", "save_video", "side_by_side", "strip",
    "subject_mask", "to_frames", "to_pixels", "trainable_parameters", "tune", "tune_on", "tuning_loss",
    "with_settings", "word_mask", "word_places",
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


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
