"""The benchmark measures one computation in several ways, and says so in a table and in JSON."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tav_core import bench
from tav_core.attention_choice import ATTENTIONS
from tav_core.block_attention import block_attention
from tav_core.cli import main
from tav_core.condition import Condition, predict
from tav_core.errors import TavError
from tav_core.objective import tuning_loss
from tav_core.precision import computing
from tav_core.trainable import trainable_parameters


@pytest.fixture(autouse=True)
def blocks_are_fastest(monkeypatch):
    """Whatever they are here."""
    monkeypatch.setattr("tav_core.attention_choice._fastest", lambda *shape: "blocks")


@pytest.fixture(scope="module")
def subject():
    subject = bench.Workload(bench.LAYOUTS["small"], "cpu")
    with torch.no_grad():  # as after some tuning: at first the temporal attention adds nothing
        for name, parameter in trainable_parameters(subject.unet).items():
            if "attn_temp.to_out" in name:
                parameter.normal_(std=0.05)
    return subject


def computed(subject, off=(), memory="fast", dtype="fp32"):
    """Prediction, loss and gradients, as one float64 vector each."""
    unet = copy.deepcopy(subject.unet)
    bench.set_attention(unet, off)
    noise = torch.randn(subject.latents.shape, generator=torch.Generator().manual_seed(1))
    with computing(unet, dtype, memory):
        with torch.no_grad():
            out = predict(unet, noise, 500, Condition(subject.texts[0]))
        loss = tuning_loss(
            unet, subject.checkpoint.scheduler, subject.latents, noise, torch.tensor([500]), subject.texts[0]
        )
        loss.backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in trainable_parameters(unet).values()])
    return [x.detach().double().flatten() for x in (out, loss, gradients)]


@pytest.fixture(scope="module")
def plain(subject):
    return computed(subject, bench.PLAIN.off)


@pytest.mark.parametrize(
    "settings, tolerance",
    [
        ({}, 1e-5),
        ({"off": ("choice",)}, 1e-5),
        ({"memory": "selective"}, 1e-5),
        ({"memory": "checkpointing"}, 1e-5),
        ({"memory": "low"}, 1e-5),
        ({"dtype": "bf16"}, 5e-2),
    ],
    ids=["choice", "fused", "selective", "checkpointing", "low", "bf16"],
)
def test_every_mode_computes_what_plain_does(subject, plain, settings, tolerance):
    for fast, expected in zip(computed(subject, **settings), plain):
        assert (fast - expected).norm() <= tolerance * expected.norm()


def test_the_switches_change_what_runs(subject, monkeypatch):
    called = []
    monkeypatch.setitem(ATTENTIONS, "blocks", lambda *qkv: called.append(1) or block_attention(*qkv))
    computed(subject, ("choice",))
    computed(subject, bench.PLAIN.off)
    assert not called
    computed(subject)
    assert called


@pytest.mark.slow
def test_operations_are_counted_as_a_run_of_plain_makes_them(subject):
    counts = {stage: subject.flops(stage) for stage in bench.COUNTED}
    latents, (said, empty, _) = subject.latents, subject.texts
    bench.set_attention(subject.unet, bench.PLAIN.off)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        subject.unet(latents, 500, said)
        assert counter.get_total_flops() == counts["invert"]
        subject.unet(torch.cat([latents] * 2), 500, torch.cat([said, empty]))
        assert counter.get_total_flops() == counts["invert"] + counts["sample"]
    with FlopCounterMode(display=False) as counter:
        tuning_loss(subject.unet, subject.checkpoint.scheduler, latents, latents, torch.tensor([500]), said).backward()
    assert counter.get_total_flops() == counts["tune"] > 2 * counts["invert"]


@pytest.fixture
def counted(monkeypatch):
    """Operations are not counted again, which takes long."""
    monkeypatch.setattr(bench.Workload, "flops", lambda self, stage: 10**9)


SMALL = ["--layout", "small", "--size", 8, "--frames", 2, "--runs", 1, "--threads", 1]


def run(monkeypatch, *options):
    monkeypatch.setattr("sys.argv", ["tav_core", "bench", "--device", "cpu", *map(str, options)])
    main()


@pytest.mark.slow
def test_a_table_and_json(monkeypatch, counted, tmp_path, capsys):
    file = tmp_path / "bench.json"
    options = ["--dtype", "fp32", "bf16", "--without", "caching"]
    run(monkeypatch, *SMALL, "--no-memory", *options, "--json", file)
    figures = json.loads(file.read_text())
    assert figures["layout"] == {"name": "small", "frames": 2, "size": 8}
    assert list(figures["seconds"]) == ["plain", "fp32", "bf16", "fp32, no caching"]
    for of in figures["seconds"].values():
        assert list(of) == list(bench.STAGES)
        assert all(value > 0 for value in of.values())
    assert list(figures["share"]) == list(figures["seconds"])
    assert all(
        list(of) == list(bench.COUNTED) and all(value > 0 for value in of.values()) for of in figures["share"].values()
    )
    ratio, told = figures["seconds"]["plain"]["tune"] / figures["seconds"]["bf16"]["tune"], capsys.readouterr().out
    assert (
        f"({ratio:.2f}x)" in told and f"{figures['share']['plain']['tune']:.3f}" in told and "GFLOP/s in bf16" in told
    )


@pytest.mark.slow
def test_the_figures_of_a_gpu_run_on_a_cpu_too(monkeypatch, counted, tmp_path, without_comfyui):
    file = tmp_path / "bench.json"
    monkeypatch.setattr(bench.Workload, "edit", lambda self, mode, real=bench.Workload.edit: real(self, mode, 2))
    options = ["--dtype", "fp32", "--memory", "checkpointing", "--stages", "tune"]
    run(monkeypatch, "--gpu", *SMALL, *options, "--json", file)
    figures = json.loads(file.read_text())
    assert list(figures["seconds"]) == ["fp32, checkpointing"]
    assert figures["edit"] > 0 and figures["share"]["fp32, checkpointing"]["tune"] > 0
    for of in figures["memory"].values():
        assert 0.1 < of["tune"]["before"] <= of["tune"]["peak"] < 4


def test_on_a_small_gpu_only_what_fits_is_measured(monkeypatch, tmp_path, capsys):
    file = tmp_path / "bench.json"
    monkeypatch.setattr(bench.Workload, "edit", lambda self, mode: 1.0)
    monkeypatch.setattr(bench, "free_memory", lambda device: 0)
    monkeypatch.setattr(bench, "needed_memory", lambda *args: 10**9)
    figures = {"seconds": lambda subject, modes, *_: {mode.name: {"tune": 1.0} for mode in modes},
               "shares": lambda subject, modes, *_: {mode.name: {"tune": 0.1} for mode in modes}}  # fmt: skip
    for name, function in figures.items():  # bf16, its default there, takes a CPU long
        monkeypatch.setattr(bench, name, function)
    run(monkeypatch, "--gpu", *SMALL, "--no-memory", "--stages", "tune", "--json", file)
    assert list(json.loads(file.read_text())["seconds"]) == ["bf16, low"]
    assert "memory: low, though it needs" in capsys.readouterr().out


def test_a_mode_that_runs_out_of_memory_gets_no_figure_of_another(subject, monkeypatch):
    def out_of_memory(*args):
        if torch.is_grad_enabled():
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return tuning_loss(*args)

    monkeypatch.setattr("tav_core.tuning.tuning_loss", out_of_memory)
    with pytest.raises(TavError, match="memory='fast' ran out of memory; choose modes that take less"):
        subject.run("tune", bench.Mode())


@pytest.mark.slow
def test_it_needs_no_video_library():
    blocked = "import sys; sys.modules.update(dict.fromkeys(['av', 'cv2', 'matplotlib'])); "
    program = blocked + "sys.argv[1:] = ['bench', '--help']; from tav_core.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--gpu" in done.stdout, done.stderr


def test_exponents_of_growth(monkeypatch):
    def seconds(layout, modes, stages, runs):
        return {modes[0].name: {"tune": 3.0 * layout.frames, "sample": 0.5 * layout.size**4}}

    monkeypatch.setattr(bench, "Workload", lambda layout, device: layout)
    monkeypatch.setattr(bench, "seconds", seconds)
    monkeypatch.setattr(
        bench, "memory", lambda layout, *rest: {"peak": 1 + layout.frames * layout.size**2, "before": 1}
    )
    found = bench.growth(bench.LAYOUTS["small"], bench.Mode(), 1, "cpu", {"frames": (2, 4, 8), "size": (16, 32)})
    assert found["frames"]["exponents"] == pytest.approx({"tune": 1, "sample": 0, "tune GB": 1, "sample GB": 1})
    assert found["size"]["exponents"] == pytest.approx({"tune": 0, "sample": 2, "tune GB": 1, "sample GB": 1})


def test_the_layout_of_the_paper_is_that_of_stable_diffusion():
    with torch.device("meta"):
        checkpoint = bench.LAYOUTS["sd15"].checkpoint()
    assert sum(parameter.numel() for parameter in checkpoint.unet.parameters()) == 859_520_964
    assert (checkpoint.downscale, checkpoint.size) == (8, 512)


def test_memory_that_cannot_be_read_is_told_first(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "_PROCESS", tmp_path / "none")
    monkeypatch.setattr(bench, "seconds", lambda *args: pytest.fail("it has begun"))
    with pytest.raises(SystemExit):
        run(monkeypatch, "--layout", "small")
    assert "use --no-memory, without --growth" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, told",
    [
        (["--runs", 0], "--runs 0"),
        (["--size", 12], "--size 12 is not a positive multiple of 8"),
        (["--frames", -1], "--frames -1"),
    ],
)
def test_what_cannot_be_run_is_refused(monkeypatch, capsys, options, told):
    with pytest.raises(SystemExit):
        run(monkeypatch, *options)
    assert told in capsys.readouterr().err
