"""How a U-Net computes while it is tuned: tuned weights in float32, the others in the computing dtype."""

import functools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .inflation import VideoUNet
from .trainable import trainable_parameters

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SCALE_INTERVAL = 2000  # good steps before the fp16 loss scale doubles


@contextmanager
def computing(unet: VideoUNet, dtype: str, memory: str) -> Iterator[None]:
    """Frozen weights in the computing dtype, trainable ones in float32; all, and the memory mode, as before on leaving.

    Args:
        memory: the mode to compute in, or "auto" for the one that the U-Net has.
    """
    parameters, wanted = trainable_parameters(unet), DTYPES[dtype]
    tuned = set(map(id, parameters.values()))
    # originals wait on the CPU, or computing in half precision would not save device memory
    cast = [(p, p.device, p.data.cpu()) for p in unet.parameters() if id(p) not in tuned and p.dtype != wanted]
    dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
    mode = unet.memory
    try:
        for parameter, _, _ in cast:
            parameter.data = parameter.data.to(wanted)
        for parameter in parameters.values():
            parameter.data = parameter.data.float()
        unet.set_memory(mode if memory == "auto" else memory)
        yield
    finally:
        for parameter, device, original in cast:
            parameter.data = original.to(device)
        for name, parameter in parameters.items():
            parameter.data, parameter.grad = parameter.data.to(dtypes[name]), None
        unet.set_memory(mode)


@functools.cache
def half_precision_cost(dtype: torch.dtype) -> float:
    """How many times longer than in float32 a matrix product in that dtype takes on this CPU; some hundredths of a
    second.
    """
    best = dict.fromkeys((torch.float32, dtype), math.inf)
    for _ in range(6):
        for of in best:
            a = torch.ones(192, 192, dtype=of)
            started = time.perf_counter()
            a @ a
            best[of] = min(best[of], time.perf_counter() - started)
    return best[dtype] / best[torch.float32]


def next_scale(scale: float, age: int, finite: bool) -> tuple[float, int]:
    """Dynamic scaling of the fp16 loss: the factor and the steps that it has lasted, after one with finite gradients or
    not.
    """
    if not finite:
        return scale / 2, 0
    return (scale * 2, 0) if age + 1 == _SCALE_INTERVAL else (scale, age + 1)
