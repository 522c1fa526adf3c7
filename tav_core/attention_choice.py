"""Which attention a CPU computes fastest, PyTorch's or one of three others: measured where it runs.

Which of them wins, by up to three times, depends on the CPU, the dtype, the width of the heads and the lengths. So
every shape is measured once, on a part of its heads and queries: for milliseconds, or for some seconds where a tuning
takes many minutes. What was found is kept in PyTorch's cache folder (`cache_file`), so that later runs on the same
machine, with as many threads and the same PyTorch, compute the very same, to the bit; where it can't be kept, PyTorch's
is taken. What was found while other programs had the processor says little, and is kept for a day.
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

from .atomic import atomic_path
from .block_attention import block_attention
from .errors import TavError
from .mixed_attention import AVAILABLE, mixed_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
_MANY = 1 << 15  # scores; with fewer it hardly matters
_FEW = 32  # keys, whose scores may be held: they are hardly more than the queries
_SAMPLE = 1 << 21, 1 << 24  # scores of a measurement: a quarter of all, but at least and at most so many
_MARGIN = 1.2  # another than PyTorch's must be so many times as quick
_TURNS = 3
_LONG = 2.0  # seconds, after which there are no more turns
# of the processor time that its threads could have had, a measurement needs so much to be trusted for good
_ALONE = 0.85
_DAY = 24 * 60 * 60
_FORMAT = 3  # of the file, one more whenever an attention becomes faster
CHOSEN: dict[str, str] = {}  # by shape, what this process has chosen


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention step by step, on `b heads n d`."""
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


ATTENTIONS: dict[str, Attention] = {
    "torch": F.scaled_dot_product_attention,
    "explicit": explicit_attention,
    "mixed": mixed_attention,
    "blocks": block_attention,
}


def choose_attention(q: Tensor, k: Tensor, v: Tensor) -> Attention:
    """What computes softmax attention on `b heads n d` of the CPU fastest, and its backward pass if there is one."""
    (b, heads, n, d), m = q.shape, k.shape[2]
    if b * heads * n * m < _MANY or q.dtype == torch.float64:
        return F.scaled_dot_product_attention
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return ATTENTIONS[_fastest(machine(), *_sampled(b * heads, n, m), m, d, q.dtype, backward)]


def machine() -> str:
    """What the speed of a computation depends on, and its last bits."""
    parts = (
        platform.node(),
        torch.backends.cpu.get_cpu_capability(),
        f"{torch.get_num_threads()} threads",
        f"torch {torch.__version__}",
    )
    return ", ".join(parts)


def cache_file() -> Path:
    return Path(torch.hub.get_dir()).parent / "tune-a-video" / "attention.json"


def _sampled(heads: int, n: int, m: int) -> tuple[int, int]:
    """So many heads and queries are measured; as many heads as threads keep all of them busy."""
    least, most = _SAMPLE
    scores = min(max(least, heads * n * m // 4), most)
    heads = min(heads, max(torch.get_num_threads(), scores // (n * m)))
    return heads, max(1, min(n, scores // (heads * m)))


@functools.cache
def _fastest(machine: str, heads: int, n: int, m: int, d: int, dtype: torch.dtype, backward: bool) -> str:
    """The name of the fastest, as the file says, or else as measured and put there."""
    path, shape = (
        cache_file(),
        f"{heads} heads, {n} queries, {m} keys, width {d}, {dtype}{', with backward' * backward}",
    )
    known = _read(path)
    entry = known.get(machine, {}).get(shape)
    if entry is None or entry.get("until", math.inf) < time.time():
        seconds, alone = measure(heads, n, m, d, dtype, backward)
        entry = {"seconds": seconds} | ({} if alone else {"until": time.time() + _DAY})
        known = _read(path)  # where another process was faster, all compute as it does
        now = known.setdefault(machine, {})
        if shape not in now or now[shape].get("until", math.inf) < time.time():
            now[shape] = entry
        entry = now[shape]
        try:
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps({"format": _FORMAT, "machines": known}, indent=1))
        except TavError:
            return "torch"
    seconds = entry["seconds"]
    fastest = min(seconds, key=seconds.get)
    CHOSEN[shape] = fastest if seconds["torch"] > _MARGIN * seconds[fastest] else "torch"
    return CHOSEN[shape]


def _read(path: Path) -> dict[str, dict[str, dict]]:
    """What was measured, by machine and shape; nothing where there is no such file, an older or a damaged one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content["machines"] if isinstance(content, dict) and content.get("format") == _FORMAT else {}


def _candidates(m: int, dtype: torch.dtype, backward: bool) -> list[str]:
    """What is worth a try, for so many keys."""
    unlikely = {"explicit": m > _FEW, "mixed": not (AVAILABLE and backward and dtype != torch.float32)}
    return [name for name in ATTENTIONS if not unlikely.get(name)]


@torch.inference_mode(False)
def measure(heads: int, n: int, m: int, d: int, dtype: torch.dtype, backward: bool) -> tuple[dict[str, float], bool]:
    """Seconds of each, the least of some turns, for queries `1 heads n d` and keys `1 heads m d`; whether it had the
    processor alone.
    """
    taken: dict[str, float] = {}
    began = time.perf_counter(), time.process_time()
    # in a part of the U-Net that is computed again, tensors kept for the backward pass are counted: not these
    own = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with own, torch.set_grad_enabled(backward), torch.autocast("cpu", enabled=False):
        # rows of all heads side by side, as a projection leaves them
        q, k, v = (
            torch.ones(1, rows, heads, d).cumsum(1).sin().to(dtype).transpose(1, 2).requires_grad_(backward)
            for rows in (n, m, m)
        )
        for _ in range(1 + _TURNS):  # the first is a warm-up, and often the slowest
            for name in _candidates(m, dtype, backward):
                started = time.perf_counter()
                out = ATTENTIONS[name](q, k, v)
                if backward:
                    torch.autograd.grad(out, (q, k, v), out)
                taken[name] = min(taken.get(name, math.inf), time.perf_counter() - started)
            if time.perf_counter() - began[0] > _LONG:
                break
    wall, processor = time.perf_counter() - began[0], time.process_time() - began[1]
    return taken, processor > _ALONE * torch.get_num_threads() * wall
