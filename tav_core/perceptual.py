"""LPIPS and RAFT: their packages are an extra of the pack, `perceptual`, and their weights are files that the user has.

Nothing is ever downloaded, and the packages aren't imported before a file is given. Videos are uint8 `f h w c`.
"""

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils import is_torch_version
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import TavError
from .flow import Flow
from .metrics import outside

PUBLISHED = "from https://download.pytorch.org/models/"
LPIPS_SIDE, RAFT_SIDE = 32, 128  # pixels of the shorter side that the networks need: they make frames smaller


@dataclass(frozen=True)
class LpipsModel:
    """An LPIPS in evaluation mode; `net` is "alex" or "squeeze", by the network whose features it compares."""

    model: nn.Module
    net: str


@dataclass(frozen=True)
class RaftModel:
    """torchvision's `raft_large` in evaluation mode."""

    model: nn.Module


def load_lpips(file: str | Path) -> LpipsModel:
    """An LPIPS, version 0.1, float32 on the CPU: linear weights of the package lpips, the network's from a file.

    Args:
        file: torchvision's state dict of AlexNet, as the authors of LPIPS advise for figures, or of SqueezeNet 1.1, as
            PIE-Bench and FiVE measure; .safetensors or .pth.

    Raises:
        TavError: no such file, or no package.
    """
    remedy = f"download alexnet-owt-7be5be79.pth, or PIE-Bench's squeezenet1_1-b8a52dc0.pth, {PUBLISHED}"
    with _reading(file, "lpips", "an AlexNet or a SqueezeNet 1.1 of torchvision", remedy):
        package, weights = _package("lpips", "lpips"), _weights(file, "lpips")
        net = "squeeze" if "features.3.squeeze.weight" in weights else "alex"
        with warnings.catch_warnings():  # of the words in which it asks torchvision for a network without weights
            warnings.simplefilter("ignore")
            model = package.LPIPS(net=net, pnet_rand=True, verbose=False)
        own = {name: weights[f"features.{name.partition('.')[2]}"] for name in model.net.state_dict()}  # slice1.0.bias
        model.net.load_state_dict(own)
    return LpipsModel(model.requires_grad_(False), net)


def load_raft(file: str | Path) -> RaftModel:
    """A RAFT from a file, a state dict of torchvision's `raft_large` as .safetensors or .pth, float32 on the CPU.

    Raises:
        TavError: no such file, or no package.
    """
    remedy = f"download raft_large_C_T_SKHT_V2-ff5fadd5.pth {PUBLISHED}"
    with _reading(file, "raft", "a raft_large of torchvision", remedy):
        model = _package("raft", "torchvision.models.optical_flow").raft_large(weights=None)
        model.load_state_dict(_weights(file, "raft"))
    return RaftModel(model.eval().requires_grad_(False))


@contextmanager
def _reading(file: str | Path, field: str, kind: str, remedy: str) -> Iterator[None]:
    if not Path(file).is_file():
        raise TavError(field, file, "is no file", remedy)
    try:
        yield
    except TavError:
        raise
    except Exception as error:  # the libraries fail in every way over a damaged file, or one of something else
        told = " ".join(str(error).split())[:200]
        raise TavError(field, file, f"can't be read as {kind} ({told})", remedy) from error


def _package(field: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = (error.name or name).partition(".")[0]
        problem = f"needs the package {package}, of the pack's extra perceptual"
        raise TavError(field, None, problem, f"run pip install {package}") from error
    except RuntimeError as error:  # torchvision::nms does not exist
        problem = f"needs torchvision, and the one that is installed doesn't fit torch {torch.__version__} ({error})"
        raise TavError(field, None, problem, "install the one that was built for it, from where torch came") from error


def _weights(file: str | Path, field: str) -> dict[str, Tensor]:
    if Path(file).suffix.lower() == ".safetensors":
        return load_file(file)
    if not is_torch_version(">=", "2.6"):  # CVE-2025-32434
        problem = f"is a pickle, which torch {torch.__version__} can't read safely"
        raise TavError(field, file, problem, "update torch to 2.6, or save its tensors as .safetensors")
    return torch.load(file, map_location="cpu", weights_only=True)


@torch.no_grad()
def lpips_distance(lpips: LpipsModel, video: Tensor, reference: Tensor, mask: Tensor | None = None) -> float:
    """LPIPS (Zhang et al., arXiv 1801.03924) against another video of the same shape, mean over frames; 0 if equal.

    As in PIE-Bench both are black in the mask, and compared whole, in -1 ... 1.

    Args:
        mask: as for the figures of `metrics`.
    """
    device, values = _device(lpips), []
    for pair in zip(*outside(video, reference, mask)):
        ours, theirs = (torch.from_numpy(frame * 2 - 1).float().movedim(-1, 0)[None].to(device) for frame in pair)
        values.append(lpips.model(ours, theirs).item())
    return float(np.mean(values))


def raft_flow(raft: RaftModel) -> Flow:
    """RAFT's flow (Teed and Deng, arXiv 2003.12039) `h w (x y)` in pixels, of frames of 128 pixels or more.

    As torchvision computes it: 12 updates, colours in -1 ... 1, and as in RAFT's own evaluation the frame's edge is
    repeated on all sides up to multiples of 8.
    """

    @torch.no_grad()
    def flow(now: np.ndarray, then: np.ndarray) -> np.ndarray:
        (height, width), device = now.shape[:2], _device(raft)
        left, top = -width % 8 // 2, -height % 8 // 2
        edge = left, -width % 8 - left, top, -height % 8 - top
        pair = [torch.from_numpy(frame).to(device).movedim(-1, 0)[None] / 127.5 - 1 for frame in (now, then)]
        found = raft.model(*(F.pad(frame, edge, mode="replicate") for frame in pair))[-1]
        return found[0, :, top : top + height, left : left + width].movedim(0, -1).cpu().numpy()

    return flow


def _device(own: LpipsModel | RaftModel) -> torch.device:
    return next(own.model.parameters()).device
