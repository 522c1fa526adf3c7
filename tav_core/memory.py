"""Which memory mode suits a tuning, and how many edits go together: what a step needs, found before the run, against
what is free.
"""

import copy
import gc
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch
from diffusers.utils import is_torch_version
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .inflation import VideoUNet
from .recompute import MEMORY
from .take import Take
from .trainable import trainable_parameters

MARGIN = 1.2  # of what is needed: for kernels' own buffers and gaps between blocks of memory, which nobody counts


def needed_memory(unet: VideoUNet, take: Take, dtype: torch.dtype, memory: str, device: torch.device) -> int:
    """Bytes that a tuning step takes beyond the weights of the U-Net, in a memory mode (one of `MEMORY`).

    The step is run, forward and backward, on tensors without content (of the device "meta"), which have all but the
    memory: the most that live at once, and for each tuned weight AdamW's two moments and the copy that a failed run
    goes back to. Left out are what kernels take for themselves (convolutions above all), the callback (a preview) and
    gaps: on the CPU the C library keeps freed tensors of up to 32 MB, which small clips notice. Takes a second or two,
    even for Stable Diffusion, and as long for any clip.

    Args:
        take: the largest; nothing but its shapes counts.
        dtype: of the computation.
        device: where it will run; the U-Net may be elsewhere.
    """
    tuned_bytes = 4 * sum(parameter.numel() for parameter in trainable_parameters(unet).values())
    if is_torch_version("<", "2.6") and not hasattr(torch, "meta"):
        # what computes a part again asks such a module there whether the device draws random numbers
        torch._register_device_module("meta", types.ModuleType("meta"))
    unet, told = _counted(unet, dtype, device), take.condition
    unet.set_memory(memory)
    timestep = torch.zeros((), dtype=torch.int64, device=_NOWHERE)
    labels = {name: _emptied(value) for name, value in told.keywords.items()}
    with _Peak([*unet.parameters(), *unet.buffers()]) as count:
        predicted = unet(_emptied(take.latents, dtype), timestep, _emptied(told.encoder_hidden_states, dtype), **labels)
        predicted.float().square().mean().backward()
    return count.peak + 3 * tuned_bytes


@torch.no_grad()
def sampling_memory(unet: VideoUNet, latents: Tensor, text: Tensor, edits: int) -> int:
    """Bytes that a sampling step takes beyond the models, for guided edits of a clip that are drawn together beside it.

    Counted as in `needed_memory`, on tensors without content. A ControlNet isn't counted.

    Args:
        unet: as it samples; nothing but shapes, dtype and device counts, of `latents` (`1 c f h w`, as many frames as
            it sees at once) and `text` (`1 n d`) the shapes alone.
    """
    videos, dtype = 1 + 2 * edits, unet.dtype
    unet = _counted(unet, dtype, unet.device)
    x, words = (_emptied(of.expand(videos, *of.shape[1:]), dtype) for of in (latents, text))
    labels = {}
    if unet.class_embedding is not None:
        labels = {"class_labels": torch.zeros(videos, dtype=torch.int64, device=_NOWHERE)}
    timestep = torch.zeros((), dtype=torch.int64, device=_NOWHERE)
    with _Peak([*unet.parameters(), *unet.buffers()]) as count, unet.frame_context.running(sources=1):
        unet(x, timestep, words, **labels)
    return count.peak


_NOWHERE = torch.device("meta")


def _emptied(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=_NOWHERE)


def _counted(unet: VideoUNet, dtype: torch.dtype, device: torch.device) -> VideoUNet:
    """A copy without content whose tensors are those of a U-Net that computes in a dtype on a device."""
    unet, copies = without_content(unet, dtype, _NOWHERE), device.type == "cpu"
    unet.frame_context.set(attention_fn=lambda q, k, v, mask=None: _FusedAttention.apply(q, k, v, copies))
    unet.get_class_embed = super(VideoUNet, unet).get_class_embed  # which doesn't look at the labels' values
    return unet


def without_content(unet: VideoUNet, dtype: torch.dtype, device: torch.device) -> VideoUNet:
    """A copy, as it computes in a dtype on a device, whose weights have no content: on the device "meta", or made and
    used under a `FakeTensorMode`.
    """
    weights = {
        id(p): nn.Parameter(
            torch.empty(p.shape, dtype=torch.float32 if p.requires_grad else dtype, device=device), p.requires_grad
        )
        for p in unet.parameters()
    }
    buffers = {id(x): torch.empty(x.shape, dtype=x.dtype, device=device) for x in unet.buffers()}
    return copy.deepcopy(unet, weights | buffers)


class _FusedAttention(torch.autograd.Function):
    """The memory of attention that never holds all scores: it keeps queries, keys, values and output."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, copies: bool) -> Tensor:
        out, ctx.copies = torch.empty_like(q), copies
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, _ = ctx.saved_tensors
        copies = [*[q] * 6, *[k] * 8] if ctx.copies else []  # of `block_attention`, on the CPU
        return *[torch.empty_like(x) for x in (q, k, v, *copies)][:3], None


class _Peak(TorchDispatchMode):
    """The most bytes that live at once of the tensors that operations make; views of `given` ones take none."""

    def __init__(self, given: list[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.living = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.living:
                self.living.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, key: int, size: int):
        self.living.remove(key)
        self.now -= size


def free_memory(device: torch.device) -> int:
    """Bytes that the device can still give: on CUDA also what PyTorch keeps and doesn't use, elsewhere the system's
    memory.
    """
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    return psutil.virtual_memory().available


@contextmanager
def offloaded(*models: nn.Module) -> Iterator[None]:
    """Models that aren't needed for a while wait on the CPU: those of Stable Diffusion leave 0.8 GB to the tuning."""
    devices = [next(model.parameters()).device for model in models]
    try:
        for model in models:
            nn.Module.to(model, "cpu")
        yield
    finally:
        for model, device in zip(models, devices):
            nn.Module.to(model, device)


class Device:
    """Where a tuning runs, and what it may hold there: the device that the U-Net is on.

    A program that keeps other models there as well, such as ComfyUI, makes room in a class of its own (`ComfyDevice` of
    the nodes).
    """

    def __init__(self, device: torch.device):
        self.device = device

    def make_room(self, needed: Callable[[], int]):
        """Called before the tuning: after it the U-Net is on the device.

        Args:
            needed: tells how many bytes a step will take beside the U-Net.
        """

    def free(self) -> int:
        """Bytes that a step may take now."""
        return free_memory(self.device)


def choose(needed: Callable[[str], int], free: int) -> tuple[str, str]:
    """The first of the `MEMORY` modes that fits into `free` bytes with a margin, or the last; and a line on why."""
    unfit = ""
    for memory in MEMORY:
        wanted = needed(memory) * MARGIN
        if wanted <= free:
            why = (
                f"since {unfit} and {_gb(free)} are free"
                if unfit
                else f"which needs about {_gb(wanted)} of the {_gb(free)} that are free"
            )
            return memory, f"memory: {memory}, {why}"
        unfit = f"{memory} needs about {_gb(wanted)}"
    return memory, f"memory: {memory}, though it needs about {_gb(wanted)} and {_gb(free)} are free"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed: CUDA's, or by its words one of the CPU (on Windows: "not enough memory"), MPS or
    cuBLAS.
    """
    told = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(words in str(error) for words in told)


def release(device: torch.device):
    """Gives back what a failed step has left."""
    torch.zeros(
        (), requires_grad=True
    ).backward()  # until it runs again, autograd's queue on the CPU holds the failed graph
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
