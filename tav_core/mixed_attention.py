"""PyTorch's fused attention for CPUs, forward in the dtype of its inputs and backward in float32.

For narrow heads on an Intel Xeon with AMX, PyTorch's own backward pass takes up to five times as long in bfloat16 as in
float32, although its forward pass is the quicker one there. Where this pays, `attention_choice` finds out.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# not public: without them there is no such attention
_FORWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
AVAILABLE = bool(_FORWARD and _BACKWARD)


def mixed_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v on `b heads n d` of one dtype; keys and values `b heads m d`."""
    return _MixedAttention.apply(*(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)))


class _MixedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, log_sum = _FORWARD(q, k, v)
        ctx.save_for_backward(q, k, v, out, log_sum)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        *inputs, out, log_sum = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            grads = _BACKWARD(grad.float(), *(x.float() for x in inputs), out.float(), log_sum, 0.0, False)
        return tuple(x.to(grad.dtype) for x in grads)
