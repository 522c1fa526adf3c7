"""Tune-A-Video (Wu et al., ICCV 2023, arXiv 2212.11565): one-shot tuning of image diffusion models to edit video."""

from .checkpoint import Checkpoint, decode_video, encode_prompt, encode_video, load_checkpoint, load_controlnet
from .condition import Condition
from .ddim import ddim_invert, ddim_sample, ddim_timesteps
from .errors import Cancelled, TavError
from .events import DDIMStep, Note, Step, TuningStep
from .inflation import VideoUNet, inflate, trainable_parameters
from .injection import EditPlaces, SourceWalk
from .noise import read_noise, save_noise
from .pipeline import Source, find_subject, invert, prepare, sample, tune_on
from .presets import PRESETS, Preset, with_settings
from .subject import subject_mask
from .take import Take
from .tuned_weights import TunedInfo, base_fingerprint, load_tuned, read_tuned, save_tuned
from .tuning import TuneConfig, TuneResult, tune, tuning_loss
from .video import Clip, load_video, save_video, to_frames, to_pixels
from .visuals import loss_curve, side_by_side, strip
from .windows import ContextWindows, WindowedUNet

__all__ = [
    "PRESETS", "Cancelled", "Checkpoint", "Clip", "Condition", "ContextWindows", "DDIMStep", "EditPlaces",
    "Note", "Preset", "Source", "SourceWalk", "Step", "Take", "TavError", "TuneConfig", "TuneResult",
    "TunedInfo", "TuningStep", "VideoUNet", "WindowedUNet", "base_fingerprint", "ddim_invert", "ddim_sample",
    "ddim_timesteps", "decode_video", "encode_prompt", "encode_video", "find_subject", "inflate", "invert",
    "load_checkpoint", "load_controlnet", "load_tuned", "load_video", "loss_curve", "prepare", "read_noise",
    "read_tuned", "sample", "save_noise", "save_tuned", "save_video", "side_by_side", "strip", "subject_mask",
    "to_frames", "to_pixels", "trainable_parameters", "tune", "tune_on", "tuning_loss", "with_settings",
]  # fmt: skip
