"""Nodes for ComfyUI, a file per stage. They validate, convert and report; the method is in `tav_core`."""

import folder_paths
from comfy_api.latest import ComfyExtension, io

from ..tav_core.checkpoint import MINI
from .compare import Compare
from .inflate import Inflate
from .inject import AttentionInjection
from .invert import DDIMInversion
from .inverted_noise import LoadInvertedNoise, SaveInvertedNoise
from .load_checkpoint import LoadCheckpoint
from .load_controlnet import LoadControlNet
from .load_folder import LoadVideoFolder
from .load_video import LoadVideo
from .measure import Measure
from .put_back import PutBack
from .sample import VideoSampler
from .subject import SubjectMask
from .take import Take
from .tune import OneShotTune
from .tuned_weights import ApplyTunedWeights, LoadTunedWeights, SaveTunedWeights
from .windows import ContextWindows
from .word import WordMask

NODES = [LoadVideo, LoadVideoFolder, LoadCheckpoint, LoadControlNet, Inflate, Take, OneShotTune, SaveTunedWeights,
         LoadTunedWeights, ApplyTunedWeights, ContextWindows, DDIMInversion, SaveInvertedNoise, LoadInvertedNoise,
         SubjectMask, WordMask, AttentionInjection, VideoSampler, PutBack, Compare, Measure]  # fmt: skip

# for the stock LoRA loaders, behind the user's own folders: a file of the same name there is the one that is taken
folder_paths.add_model_folder_path("loras", str(MINI.parent / "lora"))


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> Extension:
    return Extension()
