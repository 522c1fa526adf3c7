"""Exact softmax attention for CPUs, forward and backward, that never holds all scores.

The scores of a few thousand keys with heads as narrow as those of small models (8 to 16 channels) cost more in
exponentials and passes over memory than in multiplications. So a block of queries meets all keys at once, while its
scores stay in the cache (after Rabe & Staats, arXiv 2112.05682), and the backward pass computes them again from the
log-sum-exp (after FlashAttention, arXiv 2205.14135). What makes it quick: the sum of the exponentials comes from the
same product as the output, by a column of ones beside the values; in the backward pass two more columns subtract the
log-sum-exp and the inner product of output and gradient; the largest score is subtracted only where queries and keys
are so long that it might be too much for an exponential; all products run along contiguous memory; exponentials are of
base 2; and all blocks of a call share their buffers.

Whether it is quicker than others depends on the CPU and the width of the heads: see `attention_choice`.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_LOG2_E = math.log2(math.e)
_SCORES = 1 << 19  # of a thread in a block: two megabytes, which stay in the caches
_SAFE = 100.0  # scores of base 2 up to here, and the sums of their exponentials, are far from the ends of float32


def block_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v on `b heads n d`, in float32 whatever the dtype; keys and values `b heads m d`."""
    return _BlockAttention.apply(q, k, v)


def _extent(heads: int, n: int, m: int) -> tuple[int, int]:
    """Heads and queries of the largest block: as many heads as threads, each with some queries; more where heads have
    few scores.
    """
    threads = torch.get_num_threads()
    return min(heads, max(threads, threads * _SCORES // (n * m))), max(1, min(n, _SCORES // m))


def _parts(size: int, dim: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(x.split(size, dim) for x in tensors))


def _product(a: Tensor, b: Tensor, buffer: Tensor) -> Tensor:  # z m d, z d n -> z m n
    shape = len(a), a.shape[1], b.shape[2]
    return torch.bmm(a, b, out=buffer[: math.prod(shape)].view(shape))


def _with_ones(x: Tensor) -> Tensor:  # z m d -> z m d+1
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)


def _by_head(x: Tensor) -> Tensor:  # b heads n d -> z n d
    return x.float().reshape(-1, *x.shape[2:])


def _queries(q: Tensor) -> Tensor:  # b heads n d -> z d n, scaled for exponentials of base 2
    return (_by_head(q) * (_LOG2_E * q.shape[-1] ** -0.5)).mT.contiguous()


class _BlockAttention(torch.autograd.Function):
    # scores are `z m n`, keys by queries of each head: the products then run along contiguous memory.
    # Kept for the backward pass are the inputs as they came, which live on anyway, not what is made of them
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        b, heads, n, d = query.shape
        q, k, v1 = _queries(query), _by_head(key), _with_ones(_by_head(value)).mT.contiguous()  # z d n, z m d, z d+1 m
        out, largest = q.new_empty(b * heads, d + 1, n), q.new_zeros(b * heads, 1, n)
        safe = q.square().sum(1).amax(1) * k.square().sum(2).amax(1) < _SAFE**2  # by Cauchy and Schwarz; not if NaN
        together, queries = _extent(b * heads, n, k.shape[1])
        buffer = q.new_empty(together * k.shape[1] * queries)
        for q_z, k_z, v1_z, out_z, largest_z, safe_z in _parts(together, 0, q, k, v1, out, largest, safe):
            shifted = not safe_z.all()
            for q_i, out_i, largest_i in _parts(queries, 2, q_z, out_z, largest_z):
                scores = _product(k_z, q_i, buffer)
                if shifted:
                    scores.sub_(torch.amax(scores, 1, keepdim=True, out=largest_i))
                out_i.copy_(v1_z @ scores.exp2_())
        out, total = out[:, :d], out[:, d:]
        out = (out / total).mT.reshape(query.shape).to(query.dtype)
        ctx.save_for_backward(query, key, value, out, largest + total.log2())
        return out

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, out, log_sum = ctx.saved_tensors
        d, dtype = query.shape[-1], query.dtype
        q, k, v, grad, out = _queries(query), _by_head(key), _by_head(value), _by_head(grad).mT, _by_head(out).mT
        grad = grad.contiguous()  # z d n
        q1 = torch.cat([q, -log_sum], dim=1)
        grad1 = torch.cat([grad, -(grad * out).sum(1, keepdim=True)], dim=1)
        k1, v1, kt = _with_ones(k), _with_ones(v), k.mT.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(kt), torch.zeros_like(kt)
        together, queries = _extent(len(q), q.shape[2], k.shape[1])
        buffers = q.new_empty(2, together * k.shape[1] * queries)
        for k1_z, v1_z, kt_z, dk_z, dv_z, *of_queries in _parts(
            together, 0, k1, v1, kt, dk, dv, q, q1, grad, grad1, dq
        ):
            for q_i, q1_i, grad_i, grad1_i, dq_i in _parts(queries, 2, *of_queries):
                weights = _product(k1_z, q1_i, buffers[0]).exp2_()
                dscores = _product(v1_z, grad1_i, buffers[1]).mul_(weights)
                dq_i.copy_(kt_z @ dscores)
                dk_z.baddbmm_(q_i, dscores.mT)
                dv_z.baddbmm_(grad_i, weights.mT)
        grads = dq * d**-0.5, dk / _LOG2_E, dv
        return tuple(x.mT.reshape(like.shape).to(dtype) for x, like in zip(grads, (query, key, value)))
