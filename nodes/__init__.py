"""Nodes for ComfyUI, a file per stage. They validate, convert and report; the method is in `tav_core`."""

from comfy_api.latest import ComfyExtension, io

from .compare import Compare
from .inflate import Inflate
from .inject import AttentionInjection
from .invert import DDIMInversion
from .load_checkpoint import LoadCheckpoint
from .load_video import LoadVideo
from .sample import VideoSampler
from .subject import SubjectMask
from .take import Take
from .tune import OneShotTune
from .tuned_weights import ApplyTunedWeights, LoadTunedWeights, SaveTunedWeights
from .windows import ContextWindows
from .word import WordMask

NODES = [LoadVideo, LoadCheckpoint, Inflate, Take, OneShotTune, SaveTunedWeights, LoadTunedWeights, ApplyTunedWeights,
         ContextWindows, DDIMInversion, SubjectMask, WordMask, AttentionInjection, VideoSampler, Compare]  # fmt: skip


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> Extension:
    return Extension()
