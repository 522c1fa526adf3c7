"""Attention in blocks of queries is the attention that everybody computes."""

import pytest
import torch

from tav_core import block_attention as blocks


def explicit(q, k, v):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


@pytest.fixture(params=[1 << 18, 700], ids=["several heads a block", "several blocks a head"])
def size(request, monkeypatch):
    monkeypatch.setattr(blocks, "_SCORES", request.param)


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("n, m, d", [(64, 128, 8), (50, 77, 40), (1, 1, 4), (6, 6, 16)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_outputs_and_gradients_equal_those_of_explicit_softmax(n, m, d, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, rows, d, generator=generator).to(dtype) for rows in (n, m, m)]
    grad = torch.randn(2, 3, n, d, generator=generator).to(dtype)

    def run(function, inputs, grad):
        inputs = [x.clone().requires_grad_() for x in inputs]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    expected = run(explicit, [x.double() for x in inputs], grad.double())
    for x, y in zip(run(blocks.block_attention, inputs, grad), expected):
        assert x.dtype == dtype
        assert (x - y).norm() <= tolerance * y.norm() + (1e-5 if m == 1 else 0)  # one key: no gradient of q and k


def test_scores_that_exp_cannot_hold():
    q, k, v = torch.full((1, 1, 4, 8), 100.0), torch.randn(1, 1, 9, 8) * 100, torch.randn(1, 1, 9, 8)
    assert torch.allclose(blocks.block_attention(q, k, v), explicit(q, k, v), atol=1e-5)


def test_under_autocast_the_result_is_as_precise_as_its_inputs():
    q, k, v = (torch.randn(1, 2, 64, 8) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = blocks.block_attention(q, k, v)
    assert (out - explicit(q, k, v)).abs().max() < 1e-5
