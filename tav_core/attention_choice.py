"""Which attention a CPU computes faster, PyTorch's or ours in blocks: measured where it runs.

Which of the two wins, by up to three times, depends on the CPU, the width of the heads and the lengths. So every shape is measured
once, on a part of its heads and queries, for some milliseconds. What was found is kept in PyTorch's cache folder (`cache_file`), so
that later runs on the same machine, with as many threads and the same PyTorch, compute the very same, to the bit; where it can't be
kept, PyTorch's is taken.
"""

import functools
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_attention import block_attention
from .errors import TavError
from .files import atomic_path

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
_MANY = 1 << 19  # scores; with fewer it hardly matters
_SAMPLE = 1 << 21  # scores of a measurement
_MARGIN = 1.2  # ours must be so many times as quick
_TURNS = 3


def choose_attention(q: Tensor, k: Tensor, v: Tensor) -> Attention:
    """What computes softmax attention on `b heads n d` of the CPU fastest, with its backward pass if it will have one."""
    (b, heads, n, d), m = q.shape, k.shape[2]
    if b * heads * n * m < _MANY or q.dtype == torch.float64:
        return F.scaled_dot_product_attention
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    faster = _blocks_are_faster(machine(), *_sampled(b * heads, n, m), m, d, q.dtype, backward)
    return block_attention if faster else F.scaled_dot_product_attention


def machine() -> str:
    """What the speed of a computation depends on, and its last bits."""
    parts = platform.node(), torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads", f"torch {torch.__version__}"
    return ", ".join(parts)


def cache_file() -> Path:
    return Path(torch.hub.get_dir()).parent / "tune-a-video" / "attention.json"


def _sampled(heads: int, n: int, m: int) -> tuple[int, int]:
    """So many heads and queries are measured; as many heads as threads keep all of them busy."""
    heads = min(heads, max(torch.get_num_threads(), _SAMPLE // (n * m)))
    return heads, max(1, min(n, _SAMPLE // (heads * m)))


@functools.cache
def _blocks_are_faster(machine: str, heads: int, n: int, m: int, d: int, dtype: torch.dtype, backward: bool) -> bool:
    """As the file says, or else as measured and put there."""
    path, shape = cache_file(), f"{heads} heads, {n} queries, {m} keys, width {d}, {dtype}{', with backward' * backward}"
    known = _read(path)
    if shape not in known.get(machine, {}):
        known.setdefault(machine, {})[shape] = measure(heads, n, m, d, dtype, backward)
        try:
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(known, indent=1))
        except TavError:
            return False
    seconds = known[machine][shape]
    return seconds["torch"] > _MARGIN * seconds["blocks"]


def _read(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds by machine, shape and kernel; nothing where there is no such file, or a damaged one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


@torch.inference_mode(False)
def measure(heads: int, n: int, m: int, d: int, dtype: torch.dtype, backward: bool) -> dict[str, float]:
    """Seconds of both, the least of some turns, for queries `1 heads n d` and keys `1 heads m d`."""
    taken: dict[str, float] = {}
    with torch.set_grad_enabled(backward), torch.autocast("cpu", enabled=False):
        q, k, v = (torch.ones(1, heads, rows, d).cumsum(2).sin().to(dtype).requires_grad_(backward) for rows in (n, m, m))
        for _ in range(1 + _TURNS):  # the first is a warm-up, and often the slowest
            for name, attention in (("torch", F.scaled_dot_product_attention), ("blocks", block_attention)):
                started = time.perf_counter()
                out = attention(q, k, v)
                if backward:
                    torch.autograd.grad(out, (q, k, v), out)
                taken[name] = min(taken.get(name, math.inf), time.perf_counter() - started)
    return taken
