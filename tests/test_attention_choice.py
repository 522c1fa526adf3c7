"""Attention on a CPU is PyTorch's, or ours where a measurement on that CPU says so."""

import json
import os

import pytest
import torch
import torch.nn.functional as F

from tav_core import attention_choice as choice
from tav_core.attention import sdpa
from tav_core.block_attention import block_attention

MANY = dict(heads=4, n=1024, m=2048, d=8)


def inputs(heads, n, m, d, dtype=torch.float32, requires_grad=False):
    return [torch.zeros(1, heads, rows, d, dtype=dtype, requires_grad=requires_grad) for rows in (n, m, m)]


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """What is measured, in turn: the seconds of PyTorch's and ours, put there by the test, and the shapes that were asked for."""
    class Measured:
        seconds, asked = (1.0, 2.0), []

    def measure(*shape):
        Measured.asked.append(shape)
        return dict(zip(("torch", "blocks"), Measured.seconds))

    Measured.asked.clear()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(choice, "measure", measure)
    choice._blocks_are_faster.cache_clear()
    yield Measured
    choice._blocks_are_faster.cache_clear()


@pytest.mark.parametrize("seconds, chosen", [
    ((1.0, 2.0), F.scaled_dot_product_attention), ((1.0, 0.9), F.scaled_dot_product_attention), ((1.0, 0.8), block_attention),
])  # fmt: skip
def test_ours_is_taken_where_it_is_faster_by_a_fifth(measured, seconds, chosen):
    measured.seconds = seconds
    assert choice.choose_attention(*inputs(**MANY)) is chosen
    assert choice.choose_attention(*inputs(**MANY)) is chosen and len(measured.asked) == 1


def test_what_was_measured_is_kept_for_later_runs(measured):
    measured.seconds = 1.0, 0.5
    choice.choose_attention(*inputs(**MANY))
    choice._blocks_are_faster.cache_clear()  # as another process
    measured.seconds = 0.5, 1.0
    assert choice.choose_attention(*inputs(**MANY)) is block_attention and len(measured.asked) == 1
    (of,) = json.loads(choice.cache_file().read_text()).values()
    assert list(of.values()) == [{"torch": 1.0, "blocks": 0.5}]


def test_each_kind_of_call_is_measured_on_a_part_of_it(measured):
    choice.choose_attention(*inputs(**MANY))
    choice.choose_attention(*inputs(**MANY, requires_grad=True))
    choice.choose_attention(*inputs(**MANY, dtype=torch.bfloat16))
    with torch.no_grad():
        choice.choose_attention(*inputs(**MANY, requires_grad=True))  # as the first
    choice.choose_attention(*inputs(heads=64, n=1024, m=77, d=40))
    heads = torch.get_num_threads()
    assert measured.asked == [
        (heads, 1024, 2048, 8, torch.float32, False), (heads, 1024, 2048, 8, torch.float32, True),
        (heads, 1024, 2048, 8, torch.bfloat16, False), (26, 1024, 77, 40, torch.float32, False),
    ]  # fmt: skip


@pytest.mark.parametrize("few", [dict(heads=1, n=64, m=128, d=8), dict(heads=8, n=256, m=512, d=8, dtype=torch.float64)])
def test_pytorch_computes_what_is_small_or_double(measured, few):
    assert choice.choose_attention(*inputs(**few)) is F.scaled_dot_product_attention and not measured.asked


@pytest.mark.parametrize("content", ["", "{", "\0"])
def test_a_damaged_file_is_written_anew(measured, content):
    measured.seconds = 1.0, 0.5
    choice.cache_file().parent.mkdir(parents=True)
    choice.cache_file().write_text(content)
    assert choice.choose_attention(*inputs(**MANY)) is block_attention
    assert len(json.loads(choice.cache_file().read_text())) == 1


def test_where_nothing_can_be_kept_pytorch_computes(measured, monkeypatch, tmp_path):
    """A later run would choose anew, and perhaps otherwise: it could not go on to the bit."""
    measured.seconds = 1.0, 0.1
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    assert choice.choose_attention(*inputs(**MANY)) is F.scaled_dot_product_attention


def test_another_machine_is_measured_anew(measured, monkeypatch):
    choice.choose_attention(*inputs(**MANY))
    monkeypatch.setattr(choice.platform, "node", lambda: "another")
    choice.choose_attention(*inputs(**MANY))
    assert len(measured.asked) == 2 and len(json.loads(choice.cache_file().read_text())) == 2


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measuring_leaves_nothing_behind(backward, dtype):
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        seconds = choice.measure(2, 64, 77, 8, dtype, backward)
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
    assert seconds.keys() == {"torch", "blocks"} and min(seconds.values()) > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_it_computes_softmax_attention_either_way(measured):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, rows, 8, generator=generator) for rows in (512, 300, 300))
    expected = ((q @ k.mT).double() * 8**-0.5).softmax(-1) @ v.double()
    for measured.seconds in ((1.0, 2.0), (2.0, 1.0)):
        choice._blocks_are_faster.cache_clear()
        os.unlink(choice.cache_file()) if choice.cache_file().exists() else None
        assert (sdpa(q, k, v) - expected).norm() < 1e-5 * expected.norm()
