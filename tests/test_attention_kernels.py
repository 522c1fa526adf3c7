"""Every attention that a CPU may choose is the attention that everybody computes."""

import math

import pytest
import torch

from tav_core import block_attention as blocks
from tav_core.attention_choice import ATTENTIONS


def explicit(q, k, v):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def outputs_and_gradients(function, inputs, grad):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def check(function, n, m, d, dtype):
    """Outputs and gradients of random inputs are those of explicit softmax in float64."""
    generator = torch.Generator().manual_seed(0)
    # rows of all heads side by side, as a projection leaves them
    *inputs, grad = (torch.randn(2, rows, 3, d, generator=generator).to(dtype).transpose(1, 2) for rows in (n, m, m, n))
    expected = outputs_and_gradients(explicit, [x.double() for x in inputs], grad.double())
    for x, y in zip(outputs_and_gradients(function, inputs, grad), expected):
        assert x.dtype == dtype
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
        assert (x - y).norm() <= tolerance * y.norm() + (1e-5 if m == 1 else 0)  # one key: no gradient of q and k


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("n, m, d", [(512, 300, 8), (40, 77, 40), (8, 8, 80), (6, 6, 16), (1, 5, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_each_computes_softmax_attention_and_its_gradients(name, n, m, d, dtype):
    check(ATTENTIONS[name], n, m, d, dtype)


@pytest.mark.parametrize("size", [1 << 18, 700], ids=["several heads a block", "several blocks a head"])
@pytest.mark.parametrize("n, m, d", [(64, 128, 8), (50, 77, 40), (1, 1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_blocks_of_any_size(size, n, m, d, dtype, monkeypatch):
    monkeypatch.setattr(blocks, "_SCORES", size)
    check(blocks.block_attention, n, m, d, dtype)


def test_scores_that_exp_cannot_hold():
    q, k, v = torch.full((1, 1, 4, 8), 100.0), torch.randn(1, 1, 9, 8) * 100, torch.randn(1, 1, 9, 8)
    assert torch.allclose(blocks.block_attention(q, k, v), explicit(q, k, v), atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("score", [99, 101], ids=["as they are", "less their largest"])
def test_scores_near_the_largest_that_exp_takes_as_they_are(score, sign):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.rand(1, 2, rows, 4, generator=generator) + 99 for rows in (20, 30))
    q *= sign * score * 2 / math.log2(math.e) / q.norm(dim=-1, keepdim=True) / k.norm(dim=-1, keepdim=True).max()
    v, grad = (torch.randn(1, 2, rows, 4, generator=generator) for rows in (30, 20))
    expected = outputs_and_gradients(explicit, [x.double() for x in (q, k, v)], grad.double())
    for x, y in zip(outputs_and_gradients(blocks.block_attention, (q, k, v), grad), expected):
        assert (x - y).norm() <= 1e-4 * y.norm()  # scores so large are known to 1e-5


def test_under_autocast_the_result_is_as_precise_as_its_inputs():
    q, k, v = (torch.randn(1, 2, 64, 8) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = blocks.block_attention(q, k, v)
    assert (out - explicit(q, k, v)).abs().max() < 1e-5
