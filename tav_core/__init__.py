"""Tune-A-Video (Wu et al., ICCV 2023, arXiv 2212.11565): one-shot tuning of image diffusion models for video editing."""

from .checkpoint import Checkpoint, decode_video, encode_prompt, encode_video, load_checkpoint, load_controlnet
from .ddim import ddim_invert, ddim_sample, ddim_timesteps
from .errors import Cancelled, TavError
from .inflation import VideoUNet, inflate, trainable_parameters
from .pipeline import Source, find_subject, invert, prepare, sample, tune_on
from .presets import PRESETS, Preset
from .subject import editable, subject_mask
from .tuned_weights import TunedInfo, base_fingerprint, load_tuned, read_tuned, save_tuned
from .tuning import TuneConfig, TuneResult, tune, tuning_loss
from .video import Clip, load_video, save_video, to_frames, to_pixels
from .visuals import loss_curve, side_by_side, strip
from .windows import ContextWindows, WindowedUNet

__all__ = [
    "PRESETS", "Cancelled", "Checkpoint", "Clip", "ContextWindows", "Preset", "Source", "TavError", "TuneConfig",
    "TuneResult", "TunedInfo", "VideoUNet", "WindowedUNet", "base_fingerprint", "ddim_invert", "ddim_sample",
    "ddim_timesteps", "decode_video", "editable", "encode_prompt", "encode_video", "find_subject", "inflate",
    "invert", "load_checkpoint", "load_controlnet", "load_tuned", "load_video", "loss_curve", "prepare", "read_tuned", "sample",
    "save_tuned", "save_video", "side_by_side", "strip", "subject_mask", "to_frames", "to_pixels",
    "trainable_parameters", "tune", "tune_on", "tuning_loss",
]  # fmt: skip
