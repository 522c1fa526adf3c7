"""Exact softmax attention for CPUs, forward and backward, that never holds all scores.

The scores of a few thousand keys with heads as narrow as those of Stable Diffusion's first level (8 to 40 channels) cost more in
exponentials and passes over memory than in multiplications. So a block of queries meets all keys at once, while its
scores stay in the cache (after Rabe & Staats, arXiv 2112.05682), and the backward pass computes them again from the
log-sum-exp (after FlashAttention, arXiv 2205.14135). Three things make it quicker than PyTorch's own kernel there:
the sum of the exponentials comes from the same product as the output, by a column of ones beside the values; in the
backward pass two more columns subtract the log-sum-exp and the inner product of output and gradient; and exponentials
are of base 2.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_LOG2_E = math.log2(math.e)
_SCORES = 1 << 18  # of a thread in a block: a megabyte, which fits the cache of a core


def block_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v on `b heads n d`, in float32 whatever the dtype; keys and values `b heads m d`."""
    return _BlockAttention.apply(q, k, v)


def _blocks(heads: int, n: int, m: int) -> Iterator[tuple[slice, slice]]:
    """Heads and queries of each block: as many heads as threads, each with some queries; more where heads have few scores."""
    queries, together = max(1, min(n, _SCORES // m)), max(torch.get_num_threads(), _SCORES // (n * m))
    for head in range(0, heads, together):
        for query in range(0, n, queries):
            yield slice(head, head + together), slice(query, query + queries)


def _with_ones(x: Tensor) -> Tensor:  # z m d -> z m d+1
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)


class _BlockAttention(torch.autograd.Function):
    # scores are `z m n`, keys by queries of each head: the products then run along contiguous memory
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, heads, n, d = q.shape
        m = k.shape[2]
        ctx.dtype = q.dtype
        q, k, v = (x.float().reshape(b * heads, -1, d) for x in (q, k, v))  # z n d, z m d
        q = (q * (_LOG2_E * d**-0.5)).mT.contiguous()  # z d n
        v1 = _with_ones(v).mT.contiguous()  # z d+1 m
        out, largest = q.new_empty(b * heads, d + 1, n), q.new_empty(b * heads, 1, n)
        for z, i in _blocks(b * heads, n, m):
            scores = k[z] @ q[z, :, i]
            largest[z, :, i] = top = scores.amax(1, keepdim=True)
            out[z, :, i] = v1[z] @ scores.sub_(top).exp2_()
        out, total = out[:, :d], out[:, d:]
        out = out / total  # z d n
        ctx.save_for_backward(q, k, v, out, largest + total.log2())
        return out.mT.reshape(b, heads, n, d).to(ctx.dtype)

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, log_sum = ctx.saved_tensors
        b, heads, n, d = grad.shape
        grad = grad.float().reshape(b * heads, n, d).mT.contiguous()  # z d n
        q1 = torch.cat([q, -log_sum], dim=1)
        grad1 = torch.cat([grad, -(grad * out).sum(1, keepdim=True)], dim=1)
        k1, v1, kt = _with_ones(k), _with_ones(v), k.mT.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(kt), torch.zeros_like(kt)
        for z, i in _blocks(b * heads, n, k.shape[1]):
            weights = (k1[z] @ q1[z, :, i]).exp2_()
            dscores = (v1[z] @ grad1[z, :, i]).mul_(weights)
            dq[z, :, i] = kt[z] @ dscores
            dk[z] += q[z, :, i] @ dscores.mT
            dv[z] += grad[z, :, i] @ weights.mT
        grads = dq * d**-0.5, dk / _LOG2_E, dv
        return tuple(x.mT.reshape(b, heads, -1, d).to(ctx.dtype) for x in grads)
