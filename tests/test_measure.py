"""The table of all figures, and its files."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from support.errors import refused
from tav_core import measure
from tav_core.clip_metrics import load_clip
from tav_core.mini import world
from tav_core.visuals import frame_curves


def clip(**changes):
    return torch.from_numpy(world.render_clip(world.clip_scenes(world.Scene(**changes), "slide", 4)))


@pytest.fixture(scope="module")
def rows():
    source, edits = clip(), [clip(colour="blue"), clip(background="sand")]
    mask = measure.mask_of(torch.from_numpy(world.silhouette_clip(world.clip_scenes(world.Scene(), "slide", 4))), 4)
    named = [("blue <b>", "a blue ball", mask), ("sand", "a red ball on the sand", None)]
    measured = [
        measure.measure(name, edit, source, prompt, mask=each) for edit, (name, prompt, each) in zip(edits, named)
    ]
    return source, edits, measured


def test_figures_of_the_edit_and_of_the_source_stand_side_by_side(rows):
    source, _, (blue, sand) = rows
    assert blue.figures["psnr_rest"] > 30 > 20 > sand.figures["psnr_rest"]  # one has a mask
    assert blue.figures["motion_fidelity"] > 0.9
    assert list(blue.figures) == [name for name in measure.FIGURES if name in blue.figures]
    assert blue.of_source == measure.measure("", source, source, "").of_source
    assert not any(name.startswith(("tgve", "dino", "tem")) for name in blue.figures)  # which need a model
    table = measure.as_table([blue, sand]).splitlines()
    assert table[0].split() == ["blue", "<b>", "sand"] and len(table) == 1 + len(blue.figures)
    assert any(line.startswith("flicker") and line.count("(") == 2 for line in table)
    sentence = "a red ball bouncing on the sand in watercolour style"
    long = measure.as_table([blue, replace(sand, name=sentence)]).splitlines()
    assert long[:2] == ["1: blue <b>", f"2: {sentence}"] and long[2].split() == ["1", "2"]
    assert [line.split() for line in long[3:]] == [line.split() for line in table[1:]]


def test_the_report_is_read_by_programs_and_people(rows, tmp_path):
    source, edits, measured = rows
    same = measure.measure("same", source, source, "a red ball")
    assert same.figures["psnr_rest"] == math.inf
    measure.write_report([*measured, same], [*edits, source], source, tmp_path)
    lines = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [line["video"] for line in lines] == ["blue <b>", "sand", "same"]
    assert float(lines[0]["flicker"]) == measured[0].figures["flicker"] and lines[2]["psnr_rest"] == "inf"
    assert float(lines[0]["source_flicker"]) == measured[0].of_source["flicker"]
    told = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert told["videos"][2]["figures"]["psnr_rest"] == "inf" and set(lines[0]) > set(told["videos"][0]["figures"])
    page = (tmp_path / "metrics.html").read_text()
    assert "blue &lt;b&gt;" in page and "data:image/png;base64," in page and "<b>blue" not in page


def test_curves_tell_which_frame_fails(rows):
    source, (edit, _), _ = rows
    mask, clip_model = torch.zeros(4, 128, 128), load_clip("mini")
    broken = edit.clone()
    broken[2] = 0
    curves = measure.by_frame(broken, source, "a blue ball", mask, clip_model)
    assert list(curves) == ["psnr_rest", "frame_difference", "tgve_text"]
    fidelity, steps, text = (values for values, _ in curves.values())
    assert fidelity.index(min(fidelity)) == 2 and max(steps[2:]) > 5 * steps[1] and math.isnan(steps[0])
    figures = measure.measure("", broken, source, "a blue ball", mask=mask, models=measure.Models(clip_model)).figures
    assert np.mean(text) == pytest.approx(figures["tgve_text"], rel=1e-3)  # of half precision
    assert np.mean(steps[1:]) == pytest.approx(figures["frame_difference"], rel=1e-4)
    assert curves["psnr_rest"][1] == [] and len(curves["tgve_text"][1]) == 4
    assert frame_curves(curves).size == (768, 672)


def test_mistakes(rows):
    source, (edit, _), _ = rows
    refused(
        "edited='e' has 2 frames of 128x128, its source 4 of 128x128", "e", edit[:2], source, "", call=measure.measure
    )
    refused("mask has 3 frames for 4", source[:3], 4, call=measure.mask_of)
    assert measure.mask_of(source[:1], 4).shape == (4, 128, 128)
