"""The commands of the mini checkpoint (`python -m tav_core.mini`), each with the least that it can do."""

import json
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from tav_core import load_video
from tav_core.checkpoint import MINI, load_checkpoint, load_controlnet
from tav_core.mini import cli, preview, train, world
from tav_core.mini import clips as clips_module
from tav_core.mini.judge import JUDGE
from tav_core.mini.preview import LATENT_COLOURS, load_latent_colours
from tav_core.mini.train_clip import CLIP
from tav_core.mini.train_lora import LORA

EDIT = ["--steps", 1, "--sampling-steps", 1, "--memory", "fast"]
PICTURES = ["--sampling-steps", 1, "--sheet"]


@pytest.fixture
def command(tav):
    return partial(tav, main=cli.main)


@pytest.fixture
def few_colours(monkeypatch):
    """Colours of quick previews are fitted to few pictures, in few steps."""
    monkeypatch.setattr(preview, "RENDERS", 8)
    fitted = preview.fit_latent_colours
    monkeypatch.setattr(preview, "fit_latent_colours", lambda latents, colours, steps: fitted(latents, colours, 20))


def test_render_draws_silhouettes(command, tmp_path):
    path = tmp_path / "hints.mp4"
    told = command("render", "--silhouette", "--shape", "star", "--frames", 3, "--output", path)
    assert told.strip() == f"{path}: a red star is sliding on the grass"
    truth = world.silhouette_clip(world.clip_scenes(world.Scene("star"), "slide", 3))
    assert np.abs(load_video(path).frames.numpy().astype(int) - truth).mean() < 4


def test_previews_writes_colours(command, few_colours, tmp_path):
    command("previews", "--output", tmp_path / "colours.safetensors")
    drawn = load_latent_colours(tmp_path / "colours.safetensors")(torch.zeros(1, 4, 16, 16))
    assert drawn.shape == (1, 3, 16, 16) and torch.isfinite(drawn).all()
    shapes = [{name: weight.shape for name, weight in load_file(path).items()}
              for path in (tmp_path / "colours.safetensors", MINI / LATENT_COLOURS)]  # fmt: skip
    assert shapes[0] == shapes[1]


@pytest.fixture
def short_clips(monkeypatch):
    """The clips of the benchmark with few frames, and edits of two kinds."""
    clips = [
        replace(clip, num_frames=3, edits={kind: clip.edits[kind] for kind in ("subject", "background")})
        for clip in clips_module.benchmark_clips()
    ]
    monkeypatch.setattr(clips_module, "benchmark_clips", lambda: clips)


def shares(figures: dict) -> bool:
    return all(0 <= value <= 1 for value in figures.values())


@pytest.mark.slow
def test_evaluate(command, tmp_path):
    figures = json.loads(command("evaluate", "--count", 3, *PICTURES, tmp_path / "sheet.png"))
    assert figures["prompts"] == 3 and shares(figures["classifier"]) and figures["classifier"]["all"] > 0.9
    assert figures["unseen"].keys() == figures["classifier"].keys() and shares(figures["unseen"])
    assert Image.open(tmp_path / "sheet.png").size == (16 * 128, 128)


def test_controlnet(command, tmp_path):
    figures = json.loads(command("controlnet", "--count", 2, *PICTURES, tmp_path / "sheet.png"))
    assert figures.keys() == {"known", "unknown"} and all(shares(part) for part in figures.values())
    assert min(part["renders"] for part in figures.values()) > 0.8
    assert Image.open(tmp_path / "sheet.png").size == (2 * 128, 4 * 128)


def test_lora(command, tmp_path):
    figures = json.loads(command("lora", "--strengths", 0, 1, "--count", 2, *PICTURES, tmp_path / "sheet.png"))
    assert figures.keys() == {"0", "1", "renders"} and all(shares(part) for part in figures.values())
    assert Image.open(tmp_path / "sheet.png").size == (2 * 128, 2 * 128)


@pytest.mark.slow
def test_benchmark(command, short_clips, tmp_path):
    options = ["--clips", 4, "--seeds", 2, "--arms", "untuned", "random_noise", "--output", tmp_path, *EDIT]
    figures = json.loads(command("benchmark", *options))
    kinds = ("clip", "subject", "background", "all")
    assert [(row["kind"], row["arm"]) for row in figures] == list(product(kinds, ("untuned", "random_noise")))
    assert {row["content"] for row in figures} == {"unseen"}  # of clip 4
    runs = {f"clip4-seed{run}" for run in ("0-untuned", "0-random_noise", "1-random_noise")}
    videos = {f"{run}-{video}.mp4" for run in runs for video in ("again", "subject", "background")}
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {path.name for path in files} == videos | {f"{run}.json" for run in runs}

    table = command("benchmark", *options, "--markdown")  # nothing of it is done again
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    assert table.count("| unseen |") == len(figures)
    told = command("benchmark", *options, "--guidance-scale", 2, fails=True)
    assert f"--output {tmp_path} holds figures of other settings; choose another --output" in told


# --------------------------------------------------------------------------------------------------- training


def step_of(path) -> int:
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(cli, "STEPS", {stage: (steps, 8) for stage, (steps, _) in cli.STEPS.items()})


@pytest.mark.slow
def test_all_stages_are_trained_exported_and_gone_on_with(command, few_colours, small_batches, tmp_path):
    work, output = tmp_path / "work", tmp_path / "output"
    stages = ("vae", "unet", "judge", "controlnet", "lora", "clip")
    options = ["--work", work, "--output", output, "--renders", 48, "--device", "cpu"]
    steps = [x for stage in stages for x in (f"--{stage}-steps", 2)]
    command("train", "all", *options, *steps)
    assert {stage: step_of(work / f"{stage}.safetensors") for stage in stages} == dict.fromkeys(stages, 2)

    checkpoint, shipped = load_checkpoint(output / "checkpoint"), load_checkpoint("mini")
    assert (checkpoint.size, checkpoint.downscale) == (shipped.size, shipped.downscale)
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(each, part).state_dict() for each in (checkpoint, shipped))
        assert {n: w.shape for n, w in ours.items()} == {n: w.shape for n, w in theirs.items()}, part
    load_controlnet(output / "controlnet")
    for ours, theirs in (
        (output / "judge.safetensors", JUDGE),
        (output / "lora" / LORA.name, LORA),
        (output / "clip" / "model.safetensors", CLIP / "model.safetensors"),
        (output / "checkpoint" / LATENT_COLOURS, MINI / LATENT_COLOURS),
    ):
        ours, theirs = load_file(ours), load_file(theirs)
        assert {n: w.shape for n, w in ours.items()} == {n: w.shape for n, w in theirs.items()}
        assert all(torch.isfinite(weight).all() for weight in ours.values())

    before = load_file(work / "vae.safetensors")
    command("train", "vae", *options, "--vae-steps", 2)  # is done
    assert all(torch.equal(weight, before[name]) for name, weight in load_file(work / "vae.safetensors").items())
    command("train", "vae", *options, "--vae-steps", 3)
    assert step_of(work / "vae.safetensors") == 3


def test_a_unet_of_another_kind(command, few_colours, small_batches, tmp_path):
    work, output = tmp_path / "work", tmp_path / "output"
    folders, kind = ["--work", work, "--renders", 48], ["--channels", 32, 48, "--prediction-type", "v_prediction"]
    for stage in ("vae", "unet", "judge"):
        command("train", stage, f"--{stage}-steps", 1, *folders, *(kind if stage == "unet" else ()))
    command("train", "export", *folders, "--output", output, *kind)
    checkpoint = load_checkpoint(output / "checkpoint")
    assert tuple(checkpoint.unet.config.block_out_channels) == (32, 48)
    assert checkpoint.scheduler.config.prediction_type == "v_prediction"
    for stage in (["unet", "--unet-steps", 2], ["export", "--output", output]):
        assert "of another model (32-48 v_prediction)" in command("train", *stage, *folders, fails=True)
    assert "does nothing for stage vae" in command("train", "vae", *folders, *kind, fails=True)
    told = command("train", "unet", *folders, "--channels", 60, 120, fails=True)
    assert "60 is not a multiple of 16" in told and "use 64" in told


@pytest.mark.parametrize("cost", [0.5, 30.0])
def test_training_computes_in_bf16_where_that_is_quicker(cost, monkeypatch):
    monkeypatch.setattr(train, "half_precision_cost", lambda dtype: cost)
    with train.autocast(torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") is (cost < 1)


def test_an_interrupted_training_ends_in_the_same_weights(tmp_path):
    def trained(name: str, halt_at: int | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        net = nn.Linear(3, 2)

        def loss_of_step(step: int) -> torch.Tensor:
            if step == halt_at:
                raise KeyboardInterrupt
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
            return (net(x) - x[:, :2]).square().mean()

        train.fit(net, loss_of_step, tmp_path / name, steps=6, lr=0.1, ema=0.9, save_seconds=0)
        return load_file(tmp_path / name)

    whole = trained("whole.safetensors")
    with pytest.raises(KeyboardInterrupt):
        trained("parts.safetensors", halt_at=3)
    assert step_of(tmp_path / "parts.safetensors") == 3
    parts = trained("parts.safetensors")
    assert parts.keys() == whole.keys() and all(torch.equal(parts[name], whole[name]) for name in whole)
