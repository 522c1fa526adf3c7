"""All that is public, for `tav_core/__init__.py`, which has their list."""

# ruff: noqa: F401
from .checkpoint import Checkpoint, decode_video, encode_prompt, encode_video, load_checkpoint, load_controlnet
from .condition import Condition, VideoModel
from .control import Control
from .ddim import ddim_invert, ddim_sample, ddim_timesteps
from .embeddings import load_embedding
from .errors import Cancelled, OutOfMemory, TavError
from .events import Callback, DDIMStep, Note, Plan, Reading, Stage, Step, TuningStep
from .export import save_pipeline
from .inflation import VideoUNet, inflate
from .injection import REGIONS, EditPlaces, SourceWalk
from .job import EditJob, run_edit
from .lora import load_lora
from .memory import Device
from .noise import InvertedNoise, read_noise, save_noise
from .pipeline import Source, find_subject, invert, prepare, reconstruct, tune_on
from .presets import PRESETS, Preset, with_settings
from .sampling import Edit, sample, sample_edits
from .sound import Sound
from .subject import subject_mask, word_mask, word_places
from .take import Take
from .terminal import Progress
from .trainable import trainable_parameters
from .tuned_weights import TunedInfo, base_fingerprint, load_tuned, read_tuned, save_tuned
from .tuning import TuneConfig, TuneResult, tune, tuning_loss
from .video import Clip, load_video, save_video, to_frames, to_pixels
from .visuals import loss_curve, side_by_side, strip
from .windows import ContextWindows, WindowedUNet
