"""Attention on a CPU is PyTorch's, or another where a measurement on that CPU says so."""

import json
import math
from functools import partial
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tav_core import attention_choice as choice
from tav_core.attention import sdpa
from tav_core.block_attention import block_attention
from tav_core.mixed_attention import AVAILABLE

MANY = dict(heads=4, n=1024, m=2048, d=8)


def inputs(heads, n, m, d, dtype=torch.float32, requires_grad=False):
    return [torch.zeros(1, heads, rows, d, dtype=dtype, requires_grad=requires_grad) for rows in (n, m, m)]


def kept():
    return json.loads(choice.cache_file().read_text())["machines"]


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """What is measured, in turn: the seconds of PyTorch's and ours, put there by the test, and the shapes that were
    asked for.
    """

    class Measured:
        seconds, alone, asked = (1.0, 2.0), True, []

    def measure(*shape):
        Measured.asked.append(shape)
        return dict(zip(("torch", "blocks"), Measured.seconds)), Measured.alone

    Measured.asked.clear()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(choice, "measure", measure)
    choice._fastest.cache_clear()
    yield Measured
    choice._fastest.cache_clear()


@pytest.mark.parametrize("seconds, chosen", [
    ((1.0, 2.0), F.scaled_dot_product_attention), ((1.0, 0.9), F.scaled_dot_product_attention),
    ((1.0, 0.8), block_attention),
])  # fmt: skip
def test_ours_is_taken_where_it_is_faster_by_a_fifth(measured, seconds, chosen):
    measured.seconds = seconds
    assert choice.choose_attention(*inputs(**MANY)) is chosen
    assert choice.choose_attention(*inputs(**MANY)) is chosen and len(measured.asked) == 1


def test_what_was_measured_is_kept_for_later_runs(measured):
    measured.seconds = 1.0, 0.5
    choice.choose_attention(*inputs(**MANY))
    choice._fastest.cache_clear()  # as another process
    measured.seconds = 0.5, 1.0
    assert choice.choose_attention(*inputs(**MANY)) is block_attention and len(measured.asked) == 1
    (of,) = kept().values()
    assert list(of.values()) == [{"seconds": {"torch": 1.0, "blocks": 0.5}}]


def test_what_was_measured_on_a_busy_machine_is_kept_for_a_day(measured, monkeypatch):
    measured.alone, measured.seconds = False, (0.5, 1.0)
    assert choice.choose_attention(*inputs(**MANY)) is F.scaled_dot_product_attention
    measured.alone, measured.seconds = True, (1.0, 0.5)
    now = choice.time.time()
    for hours, chosen in ((23, F.scaled_dot_product_attention), (25, block_attention), (1000, block_attention)):
        choice._fastest.cache_clear()  # as another process
        monkeypatch.setattr(choice.time, "time", partial(float, now + hours * 3600))
        assert choice.choose_attention(*inputs(**MANY)) is chosen
    assert len(measured.asked) == 2


def test_a_measurement_knows_whether_it_had_the_processor_alone(monkeypatch):
    """Alone, its threads have all the time that passes: here a second between two looks at the clock."""
    monkeypatch.setattr(choice, "_LONG", math.inf)
    looks = 1 + (1 + choice._TURNS) * (len(("torch", "blocks")) * 2 + 1)
    for share, alone in ((1.0, True), (0.5, False)):
        monkeypatch.setattr(choice.time, "perf_counter", partial(next, count()))
        monkeypatch.setattr(
            choice.time, "process_time", partial(next, count(0, looks * share * torch.get_num_threads()))
        )
        assert choice.measure(2, 64, 77, 8, torch.float32, False)[1] is alone


def test_it_may_be_measured_within_what_is_computed_again(monkeypatch, tmp_path):
    """There the tensors that are kept for the backward pass are counted, and must be the same the second time."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    choice._fastest.cache_clear()
    x = torch.randn(1, 4, 128, 8, requires_grad=True)
    checkpoint(lambda x: sdpa(x, x, x).square(), x, use_reentrant=False).sum().backward()
    assert x.grad.abs().sum() > 0 and kept()


def test_each_kind_of_call_is_measured_on_a_part_of_it(measured):
    choice.choose_attention(*inputs(**MANY))
    choice.choose_attention(*inputs(**MANY, requires_grad=True))
    choice.choose_attention(*inputs(**MANY, dtype=torch.bfloat16))
    with torch.no_grad():
        choice.choose_attention(*inputs(**MANY, requires_grad=True))  # as the first
    choice.choose_attention(*inputs(heads=64, n=1024, m=77, d=40))
    choice.choose_attention(*inputs(heads=512, n=256, m=512, d=16))
    choice.choose_attention(*inputs(heads=512, n=512, m=4096, d=2))
    heads = torch.get_num_threads()
    assert measured.asked == [
        (heads, 1024, 2048, 8, torch.float32, False),
        (heads, 1024, 2048, 8, torch.float32, True),
        (heads, 1024, 2048, 8, torch.bfloat16, False),
        (26, 1024, 77, 40, torch.float32, False),
        (128, 256, 512, 16, torch.float32, False),  # a quarter
        (8, 512, 4096, 2, torch.float32, False),
    ]


@pytest.mark.parametrize(
    "few", [dict(heads=1, n=64, m=128, d=8), dict(heads=8, n=256, m=512, d=8, dtype=torch.float64)]
)
def test_pytorch_computes_what_is_small_or_double(measured, few):
    assert choice.choose_attention(*inputs(**few)) is F.scaled_dot_product_attention and not measured.asked


@pytest.mark.parametrize(
    "content",
    ["", "{", "\0", "[]", '{"a machine": {"a shape": {"torch": 1.0}}}'],
    ids=["empty", "cut", "zero", "list", "older"],
)
def test_a_damaged_or_older_file_is_written_anew(measured, content):
    measured.seconds = 1.0, 0.5
    choice.cache_file().parent.mkdir(parents=True)
    choice.cache_file().write_text(content)
    assert choice.choose_attention(*inputs(**MANY)) is block_attention
    assert len(kept()) == 1


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
    assert len(measured.asked) == 2 and len(kept()) == 2


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measuring_leaves_nothing_behind(backward, dtype):
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        seconds, _ = choice.measure(2, 64, 77, 8, dtype, backward)
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
    mixed = {"mixed"} if AVAILABLE and backward and dtype == torch.bfloat16 else set()
    assert seconds.keys() == {"torch", "blocks"} | mixed and min(seconds.values()) > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_long_measurement_ends_after_a_turn(monkeypatch):
    monkeypatch.setattr(choice, "_LONG", 0.0)
    called = []
    monkeypatch.setitem(
        choice.ATTENTIONS, "torch", lambda *qkv: called.append(1) or F.scaled_dot_product_attention(*qkv)
    )
    assert choice.measure(2, 64, 77, 8, torch.float32, False)[0].keys() == {"torch", "blocks"} and len(called) == 1


def test_what_is_chosen_computes(measured):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, rows, 8, generator=generator) for rows in (512, 300, 300))
    expected = choice.explicit_attention(q.double(), k.double(), v.double())
    for measured.seconds in ((1.0, 2.0), (2.0, 1.0)):
        choice._fastest.cache_clear()
        choice.cache_file().unlink(missing_ok=True)
        assert (sdpa(q, k, v) - expected).norm() < 1e-5 * expected.norm()
