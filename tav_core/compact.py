"""Tuned weights made small: all in half precision, and of what tuning changed only as much as a low rank holds."""

from collections.abc import Mapping

import torch
from torch import Tensor

UP, DOWN = ".up", ".down"  # the two factors of a change, behind the name of its weight


def halved(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in float16 on the CPU; a weight with numbers beyond its range (65504) stays in float32."""
    small = {}
    for name, weight in weights.items():
        half = weight.detach().to("cpu", torch.float16, copy=True)
        beyond = not torch.isfinite(half).all()
        small[name] = weight.detach().to("cpu", torch.float32, copy=True) if beyond else half
    return {name: weight.contiguous() for name, weight in small.items()}


def factored(weights: Mapping[str, Tensor], before: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """`halved`, with two factors in place of every matrix that they are smaller than.

    `NAME.up`, (out, rank), times `NAME.down`, (rank, in), is the best change of that rank (truncated SVD).

    Args:
        before: the same weights as they were before the tuning.
    """
    parts = {}
    generator = torch.Generator().manual_seed(0)  # so that equal weights make equal files
    for name, weight in weights.items():
        if weight.ndim != 2 or rank * sum(weight.shape) >= weight.numel():
            parts[name] = weight
            continue
        change = weight.detach().float().cpu() - before[name].detach().float().cpu()
        # subspace iteration comes within a thousandth of the best, in a sixth of the time of a full SVD
        found = torch.randn(change.shape[1], min(rank + 16, *change.shape), generator=generator)
        for _ in range(6):
            found = torch.linalg.qr(change.T @ torch.linalg.qr(change @ found).Q).Q
        u, s, v = torch.linalg.svd(change @ found, full_matrices=False)
        root = s[:rank].sqrt()
        parts[name + UP], parts[name + DOWN] = u[:, :rank] * root, root[:, None] * (v[:rank] @ found.T)
    return halved(parts)


def shapes(parts: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Of the weights that `whole` makes of them. Parts that don't belong together stay as they are."""
    found = {name: part.shape for name, part in parts.items()}
    for name in [name.removesuffix(UP) for name in found if name.endswith(UP)]:
        up, down = found[name + UP], found.get(name + DOWN, ())
        if name not in found and len(up) == len(down) == 2 and up[1] == down[0]:
            del found[name + UP], found[name + DOWN]
            found[name] = torch.Size((up[0], down[1]))
    return found


def whole(parts: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that `halved` (as they are there) or `factored` (float32, with `before`) has made small."""
    weights = {}
    for name, old in before.items():
        if name in parts:
            weights[name] = parts[name]
        else:
            up, down = (parts[name + part].to(old.device, torch.float32) for part in (UP, DOWN))
            weights[name] = old.detach().float() + up @ down
    return weights
