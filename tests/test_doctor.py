"""doctor and --dry-run: what fits and how long it takes, by real steps, with nothing written."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel

from tav_core import PRESETS, Control, Edit, EditJob, with_settings
from tav_core.doctor import examine
from tav_core.events import ignored
from tav_core.memory import MARGIN
from tav_core.recompute import MEMORY

CLIP = Path(__file__).parents[1] / "tav_core" / "mini" / "demo.mp4"


def told(checkpoint, control=None, **settings) -> list[str]:
    preset = with_settings(PRESETS["mini"], memory="fast", **settings)
    job = EditJob("a red ball", [Edit("one"), Edit("two", "subject")], preset, ["a blue star"], control=control)
    return list(examine(checkpoint, job, 3, 64, 32, ignored))


def seconds(text: str) -> int:
    minutes, second = text.split(":")
    return int(minutes) * 60 + int(second)


@pytest.fixture
def memory(monkeypatch):
    """What a step needs, in units: 10, and for each frame 4 (fast) or less; sets how many are free."""

    def needed(unet, takes, config, memory, device):
        return (10 + 4 / 2 ** MEMORY.index(memory) * takes[0].latents.shape[2]) / MARGIN

    monkeypatch.setattr("tav_core.doctor.step_memory", needed)
    return lambda free: monkeypatch.setattr("tav_core.doctor.free_memory", lambda device: free)


def test_what_fits_and_how_long_it_takes(checkpoint, memory):
    memory(50.7)
    lines = told(checkpoint, steps=1, sampling_steps=300)
    rows = {row[0]: row[3:] for row in map(str.split, lines) if row[0] in MEMORY}
    assert rows["fast"] == ["10", "18", "40"] and rows["low"] == ["81", "144", "325"]  # of 64 x 32, 48 x 24, 32 x 16
    text = "\n".join(lines)
    assert "clip: 3 frames of 64 x 32, in fp32" in text and "(1200 steps)" in lines[-1]
    rate = {name: float(value) for name, value in re.findall(r"(tuning|inversion|sampling) ([\d.]+) s", text)}
    assert all(value >= 0 for value in rate.values()) and len(rate) == 3
    assert lines[-1].startswith("2 edits and the reconstruction take about ")
    taken = [seconds(time) for time in re.findall(r"\d+:\d\d", lines[-1])]
    assert abs(taken[0] - sum(taken[1:])) <= 4 and "finding the subject" in lines[-1] and "(8 steps)" in lines[-1]


def test_an_edit_that_is_added_to_a_project(checkpoint, memory):
    """Nothing is tuned or inverted any more, so tuning isn't timed, and the time is that of the edit alone."""
    memory(50)
    job = EditJob("a red ball", [Edit("one")], PRESETS["mini"])
    done = {"encode", "tune", "invert", "reconstruction"}
    text = "\n".join(examine(checkpoint, job, 3, 64, 32, ignored, done))
    assert "tuning " not in text.split("a step, the mean of 2:")[1] and "(25 steps)" in text
    assert "\n1 edit takes about " in text and "reconstruction" not in text


def test_it_says_that_steps_are_timed_before_they_are(checkpoint, memory, monkeypatch):
    memory(50)
    monkeypatch.setattr("tav_core.doctor.tune", lambda *args, **kwargs: pytest.fail("nothing was said"))
    job = EditJob("a red ball", [Edit("one")], PRESETS["mini"])
    assert any(line.startswith("timing 3 steps") for line in examine(checkpoint, job, 3, 64, 32, ignored))


def test_a_clip_that_does_not_fit(checkpoint, memory):
    memory(8)
    rows = [line.split() for line in told(checkpoint) if line.split()[0] in MEMORY]
    assert len(rows) == 4 and all(row[3:] == ["0", "0", "0"] for row in rows)


def test_controlnets_are_told_of(checkpoint, memory):
    memory(50)
    net = ControlNetModel.from_unet(checkpoint.unet, conditioning_embedding_out_channels=(4, 4, 4, 30000))
    hints = torch.zeros(1, 32, 64, 3, dtype=torch.uint8)
    lines = told(checkpoint, steps=1, sampling_steps=300, control=[Control(net, hints), Control(net, hints, end=0.1)])
    size = sum(weight.numel() for weight in net.parameters()) * 4 / 1e9
    assert f"ControlNets: {size:.2f} GB of weights on the device" in "\n".join(lines)  # of one, that is there twice
    assert size > 0.015 and "sampling " in lines[-1] and not any("ControlNets" in line for line in told(checkpoint))


@pytest.mark.slow
def test_the_commands(tav, tmp_path, monkeypatch, request):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr("tav_core.doctor.MEMORY", MEMORY[:1])  # an estimate of each takes a second or two
    assert "checkpoints by name: " in (out := tav("doctor")) and "device: cpu" in out and "GB free of" in out
    small = ["--checkpoint", "mini", "--frames", 2, "--size", 32]
    out = tav("doctor", *small)
    assert "mini knows a rendered world" in out and "1 edit and the reconstruction take about" in out
    request.getfixturevalue("memory")(50)  # which takes a second for each estimate
    edit = ["edit", *small, "--video", CLIP, "--prompt", "a red ball", "--edit", "a star", "--output", tmp_path / "o"]
    assert "clip: 2 frames of 32 x 32" in tav(*edit, "--dry-run")
    assert "--region subject needs to know" in tav(*edit, "--dry-run", "--region", "subject", fails=True)
    assert not list(tmp_path.iterdir())
