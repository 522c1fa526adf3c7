"""Numbers that no setting takes, whoever gives them: Python here, options in test_terminal.py, nodes as Python."""

import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from support.errors import refused
from tav_core import PRESETS, EditJob, Preset, TuneConfig, load_video, save_video, with_settings
from tav_core.limits import LIMITS, PIXELS, Range, check_pixels
from tav_core.pipeline import check_text
from tav_core.subject import softened

SETTINGS = [each.name for of in (Preset, TuneConfig) for each in fields(of) if each.name in LIMITS]
CLIP = Path(__file__).parents[1] / "tav_core" / "mini" / "demo.mp4"


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, 1e30, -1, 10**5000, True, "1"],
    ids=lambda value: str(value)[:9] if value != 10**5000 else "digits",
)
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_out_of_limits(name, value):
    refused(f"^{name}=.* is out of range; give an? (integer|number) from", PRESETS["mini"], call=with_settings,
            **{name: value})  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_both_ends_are_within(name):
    for value in (LIMITS[name].least, LIMITS[name].most):
        more = {"context_length": 10_000} if name == "context_overlap" else {}
        preset = with_settings(PRESETS["paper"], **more, **({"context_overlap": 2} if name == "context_length" else {}),
                               **{name: value})  # fmt: skip
        assert value in (getattr(preset, name, None), getattr(preset.tuning, name, None))


def test_weights_that_were_tuned_for_paper_serve_edit_as_well():
    paper, edit = PRESETS["paper"], PRESETS["edit"]
    assert edit.tuning == paper.tuning and edit.sampling_steps == paper.sampling_steps
    assert edit.attention_injection > paper.attention_injection == 0 and edit.guidance_scale < paper.guidance_scale


def test_what_must_be_given():
    refused("steps is out of range", call=TuneConfig, steps=None)
    assert TuneConfig(context_length=None).context_length is None


@pytest.mark.parametrize("name, value", [
    ("start", -1), ("start", 1e9), ("stride", 0), ("stride", 10**6), ("count", 10**9), ("count", 1.5),
    ("width", 20_000), ("height", math.nan),
])  # fmt: skip
def test_clips_that_nobody_wants(name, value):
    refused(f"{name}=.* is out of range", CLIP, call=load_video, **{name: value})


@pytest.mark.parametrize("fps", [0, math.nan, math.inf, 1e-9, -8.0])
def test_rates_that_no_player_plays(tmp_path, fps):
    frames = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    refused("fps=.* is out of range; give a number from 0.01 to 1000", frames, tmp_path / "a.mp4", fps, call=save_video)


def test_masks_and_pixels():
    refused("softness=1000000000 is out of range", torch.ones(1, 1, 1, 8, 8), 10**9, call=softened)
    refused("softness=-1 is out of range", "a ball", [], PRESETS["mini"], call=EditJob, softness=-1)
    check_pixels(PIXELS // 512**2, 512, 512)
    refused("count=1025 of 512 x 512 pixels are 269 million, more than 268; give fewer", 1025, 512, 512,
            call=check_pixels)  # fmt: skip


def test_text_that_no_file_holds():
    refused(r"prompt='caf\\udce9' is not UTF-8", "edit", "caf\udce9", call=check_text)
    check_text("edit", "шар 赤い")


@pytest.mark.parametrize("value, kind", [(1, True), (5, True), (0, False), (6, False), (2.0, False), (True, False)])
def test_whole_numbers(value, kind):
    assert (value in Range(1, 5)) is kind
    assert (value in Range(1.0, 5.0)) is (kind or value == 2.0)
