"""The command line as a user meets it: real processes on the shipped checkpoint, and commands in this one."""

import argparse
import html
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from support.checkpoints import make_folder
from support.commands import environment, tav_process
from tav_core import PRESETS, cli, load_video, prepare, save_video, terminal, with_settings
from tav_core.job import tune_into
from tav_core.mini import demo, world
from tav_core.noise import read_noise
from tav_core.record import verdict

MINI = ["--checkpoint", "mini"]
FAST = ["--steps", "4", "--sampling-steps", "4"]
CONTRAST = ["--contrast", "a blue star is sliding on the grass", "--contrast", "a green ring is sliding on the grass"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    save_video(torch.from_numpy(world.render_clip(world.clip_scenes(world.Scene(), "slide", 8))), path, 8)
    return path


@pytest.fixture(scope="module")
def edited(clip, tmp_path_factory) -> Path:
    """The output folder of a short edit."""
    output = tmp_path_factory.mktemp("edit")
    edits = ["--edit", "a blue ball is sliding on the grass", "--edit", "a red star, on the snow!"]
    regions = ["--region", "subject", "--region", "everything", *CONTRAST]
    source = ["--video", clip, "--prompt", "a red ball is sliding on the grass", "--frames", 4]
    command = ["edit", *source, *edits, *regions, "--output", output, *MINI, *FAST, "--memory", "fast"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["tav_core", *map(str, command)])
        cli.main()
    return output


@pytest.mark.slow
def test_edit_writes_videos_pictures_weights_and_a_summary(edited):
    names = {p.name for p in edited.iterdir()}
    assert names == {
        "source.mp4",
        "subject.mp4",
        "reconstruction.mp4",
        "edit-1-a-blue-ball-is-sliding-on-the-grass.mp4",
        "edit-2-a-red-star-on-the-snow.mp4",
        "comparison.mp4",
        "strip.png",
        "index.html",
        "loss.png",
        "tuned.safetensors",
        "noise.safetensors",
        "summary.json",
    }
    for name in names:
        if name.endswith(".mp4"):
            with av.open(str(edited / name)) as container:
                stream = container.streams.video[0]
                assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
            assert len(load_video(edited / name).frames) == 4
    summary = json.loads((edited / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["frames"] == 4 and summary["size"] == [128, 128]
    assert summary["vae_psnr"] > 15 and summary["vae_psnr"] > summary["walk_psnr"] > summary["reconstruction_psnr"] > 5
    assert [edit["region"] for edit in summary["edits"]] == ["subject", "everything"]
    assert summary["reconstruction_quality"] == verdict(summary["reconstruction_psnr"], summary["vae_psnr"])
    assert "dB" in summary["meanings"]["vae_psnr"]
    run = summary["run"]
    assert " edit --video " in run["command"] and run["options"]["steps"] == 4 and len(run["options"]["edit"]) == 2
    assert run["versions"]["torch"] == torch.__version__ and run["fingerprints"].keys() == {"checkpoint", "clip"}
    drawn = [summary["reconstruction"], *summary["edits"]]
    edits = [load_video(edited / each["file"]).frames.float() for each in drawn]
    stage = torch.ones(128, 128, dtype=torch.bool)
    stage[32:] = False  # the ball is below
    near, far = ((edits[0] - edit)[:, stage].abs().mean() for edit in edits[1:])
    assert near < far / 2  # what a region leaves alone isn't what an edit of everything makes of it


@pytest.mark.slow
def test_the_subject_is_told_by_a_mask_or_a_word(clip, edited, tav, tmp_path):
    run = ["invert", *MINI, "--tuned", edited / "tuned.safetensors", "--video", clip, "--start", 1, "--stride", 2]
    run += ["--frames", 3, "--sampling-steps", 2, "--output", tmp_path / "noise.safetensors"]
    hints = torch.from_numpy(world.silhouette_clip(world.clip_scenes(world.Scene(), "slide", 8)))
    save_video(hints, tmp_path / "mask.mp4", 8)
    Image.fromarray(hints[3].numpy()).save(tmp_path / "mask.png")

    def subject(*more):
        tav(*run, *more)
        return read_noise(tmp_path / "noise.safetensors").subject[0, 0]

    drawn, one = subject("--mask", tmp_path / "mask.mp4", "--softness", 0), subject("--mask", tmp_path / "mask.png")
    wanted = hints[1:7:2, :, :, 0] / 255  # cut as the clip is
    assert (drawn - wanted).abs().mean() < 0.01 and (one - wanted[1]).abs().mean() < 0.02
    named = subject("--subject", "ball")
    assert named.shape == wanted.shape and 0 < named.mean() < 0.9
    for wrong, told in (
        (["--subject", "tree"], "--subject tree is not in the sentence"),
        (["--subject", "ball", "--context-length", 3, "--context-overlap", 2], "is looked for in the whole clip"),
        (["--mask", tmp_path / "mask.png", "--contrast", "a blue star"], "--contrast does nothing with --mask"),
        (["--mask", tmp_path / "none.png"], "--mask"), (["--mask", tmp_path / "mask.mp4", "--start", 7], "--start 7"),
        (["--softness", 3], "--softness 3 does nothing without --contrast or --subject or --mask"),
    ):  # fmt: skip
        assert told in tav(*run, *wrong, fails=True)
    save_video(torch.zeros_like(hints), tmp_path / "black.mp4", 8)
    assert "--mask is black" in tav(*run, "--mask", tmp_path / "black.mp4", fails=True)
    edit = [
        "edit",
        *MINI,
        "--video",
        clip,
        "--frames",
        2,
        "--prompt",
        "a red ball is sliding on the grass",
        "--steps",
        1,
        "--memory",
        "fast",
    ]
    edit += ["--edit", "a blue ball is sliding on the grass", "--region", "subject", "--sampling-steps", 2]
    tav(*edit, "--mask", tmp_path / "mask.mp4", "--output", tmp_path / "o")
    told = tav("metrics", "--edited", tmp_path / "o")
    assert float(told.splitlines()[1].split()[1]) > 35  # PSNR of the rest
    assert "give --contrast" in tav(*edit, "--output", tmp_path / "p", fails=True)


@pytest.mark.slow
def test_metrics_of_an_edit_and_of_single_videos(edited, tav, tmp_path):
    told = tav("metrics", "--edited", edited, "--output", tmp_path / "all")
    sentences, columns = told.splitlines()[:2], told.splitlines()[2]
    assert sentences == ["1: a blue ball is sliding on the grass", "2: a red star, on the snow!"]
    assert columns.split() == ["1", "2"]
    figures = json.loads((tmp_path / "all" / "metrics.json").read_text())["videos"]
    assert [each["video"] for each in figures] == ["a blue ball is sliding on the grass", "a red star, on the snow!"]
    held, free = (each["figures"]["psnr_rest"] for each in figures)
    assert held > 35 > free  # the clip's own pixels outside of the subject
    one = ["--edited", edited / "edit-2-a-red-star-on-the-snow.mp4", "--source", edited / "source.mp4"]
    tav("metrics", *one, "--prompt", "a red star, on the snow!", "--output", tmp_path / "one")
    (alone,) = json.loads((tmp_path / "one" / "metrics.json").read_text())["videos"]
    assert alone["figures"]["psnr_rest"] == pytest.approx(free, abs=1)  # of a source that a codec has seen
    assert "metrics.html" in told and (tmp_path / "all" / "metrics.html").stat().st_size > 10_000
    for wrong, said in (
        (one[:2], "--source is missing"), (one, "--prompt has 0 values for 1 --edited"),
        (["--edited", edited, "--prompt", "x"], "which knows its source"),
        ([*one, "--prompt", "x", "--clip", tmp_path], "is no folder of a CLIP"),
        ([*one, "--prompt", "x", "--source-prompt", "y"], "--source-prompt y does nothing without --clip"),
    ):  # fmt: skip
        assert said in tav("metrics", *wrong, "--output", tmp_path / "none", fails=True)
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_demo_writes_its_files_and_judges_its_edits(tav, tmp_path):
    told = tav("demo", "--output", tmp_path, "--steps", 1, "--sampling-steps", 1, "--memory", "fast")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [edit["prompt"] for edit in summary["edits"]] == [*demo.EDITS.values()]
    files = {"source.mp4", "subject.mp4", "reconstruction.mp4", "comparison.mp4"}
    files |= {edit["file"] for edit in summary["edits"]}
    assert all(len(load_video(tmp_path / name).frames) == 8 for name in files)
    files |= {"strip.png", "index.html", "loss.png", "tuned.safetensors", "noise.safetensors", "summary.json"}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert summary["judged"].keys() == demo.EDITS.keys()
    for kind, figures in summary["judged"].items():
        assert figures.keys() == {"edited", "kept", "trajectory_corr"} and f"  {kind}" in told
        assert 0 <= figures["edited"] <= 1 and 0 <= figures["kept"] <= 1 and -1 <= figures["trajectory_corr"] <= 1


@pytest.mark.slow
def test_invert_and_sample_alone_give_the_edit_again(clip, edited, tav, tmp_path):
    tuned, noise = [*MINI, "--tuned", edited / "tuned.safetensors", *FAST[2:]], tmp_path / "n.safetensors"
    tav("invert", "--video", clip, *tuned, "--output", noise, *CONTRAST)
    edit = ["--edit", "a blue ball is sliding on the grass", "--region", "subject"]
    tav("sample", *tuned, "--noise", noise, "--output", tmp_path, *edit)
    name = "edit-1-a-blue-ball-is-sliding-on-the-grass.mp4"
    again, before = load_video(tmp_path / name).frames.float(), load_video(edited / name).frames.float()
    assert (again - before).abs().mean() < 0.5


@pytest.fixture(scope="module")
def tuned(clip, folder, checkpoint, tmp_path_factory) -> list:
    """Options for a tiny checkpoint and its weights, tuned for a step."""
    output, preset = tmp_path_factory.mktemp("tuned"), with_settings(PRESETS["paper"], steps=1, memory="fast")
    source = prepare(checkpoint, load_video(clip, count=2, width=32, height=32).frames, "a red ball")
    tune_into(output, checkpoint, [source], preset)
    return ["--checkpoint", folder, "--tuned", output / "tuned.safetensors", "--sampling-steps", 1]


def test_samples_are_added_to_a_folder(tuned, tav, tmp_path):
    sample = ["sample", *tuned, "--edit", "a star", "--output", tmp_path / "o"]
    tav(*sample, "--seed", 1)
    first = (tmp_path / "o" / "edit-1-a-star.mp4").read_bytes()
    assert "edit-2-a-star.mp4" in tav(*sample, "--seed", 2)
    told = tav(*sample, "--seed", 1, 3, "--guidance-scale", 2, 5)  # two seeds in two strengths, one of which is there
    preset = "edit-1-a-star.mp4 is there already"
    assert preset not in told and (tmp_path / "o" / "edit-1-a-star.mp4").read_bytes() == first
    assert preset in tav(*sample, "--seed", 1, "--guidance-scale", 12.5)  # as the preset has it
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    settings = [(edit["seed"], edit["guidance_scale"]) for edit in summary["edits"]]
    assert settings == [(1, 12.5), (2, 12.5), (1, 2), (1, 5), (3, 2), (3, 5)]
    assert [each["edits"] for each in summary["grids"]] == [[3, 4, 5, 6]]
    table = load_video(tmp_path / "o" / "grid-3.mp4").frames
    assert len(table) == 2 and table.shape[2] == 2 * (4 * 32 + 8)  # two columns of enlarged frames with margins
    assert Image.open(tmp_path / "o" / "grid-3.png").size == (table.shape[2], table.shape[1])
    page = (tmp_path / "o" / "index.html").read_text()
    assert all(edit["file"] in page for edit in summary["edits"])


def test_a_project_knows_the_commands_that_made_it(tuned, tav, tmp_path):
    """In summary and page, each once, to be copied from there: without escapes for names that aren't ASCII."""
    output = tmp_path / "Müller"
    for edit in ("a ☆", "<b>", "a ☆"):
        tav("sample", *tuned, "--edit", edit, "--output", output)
    summary = (output / "summary.json").read_text("utf-8")
    given = [["sample", *map(str, tuned), "--edit", edit, "--output", str(output)] for edit in ("a ☆", "<b>")]
    assert [shlex.split(command)[1:] for command in json.loads(summary)["commands"]] == given
    assert "'a ☆'" in summary and "Müller" in summary
    page = (output / "index.html").read_text("utf-8")
    assert all(html.escape(command) in page.replace("&#39;", "&#x27;") for command in json.loads(summary)["commands"])


def test_a_seed_is_of_the_tuning_or_of_random_noise(clip, tav, tmp_path):
    edit = ["edit", *MINI, "--video", clip, "--prompt", "a red ball", "--edit", "a star", "--output", tmp_path / "o"]
    told = tav(*edit, "--seed", 1, 2, fails=True)
    assert "--seed has several values, and is that of the tuning: a project is tuned once; give one for each" in told
    assert "--resume has nothing to go on with after --overwrite" in tav(*edit, "--resume", "--overwrite", fails=True)


def test_noise_knows_its_weights_and_a_folder_its_clip(tuned, clip, tav, tmp_path):
    def invert(name, *more):
        tav("invert", *tuned, "--video", clip, "--frames", 2, *more, "--output", tmp_path / name)
        return ["--noise", tmp_path / name]

    mine, other = invert("n.safetensors"), invert("other.safetensors", "--start", 3)
    sample = ["sample", *tuned, "--edit", "a star", "--output", tmp_path / "o"]
    tav(*sample, *mine)
    assert (tmp_path / "o" / "source.mp4").exists()
    told = tav(*sample, *other, fails=True)
    assert "other.safetensors is another one than that of the project in" in told
    checkpoint, weights = tuned[1], tmp_path / "again" / "tuned.safetensors"
    tune = ["tune", "--checkpoint", checkpoint, "--video", clip, "--frames", 2, "--size", 32, "--prompt", "a ball"]
    tav(*tune, "--steps", 1, "--memory", "fast", "--output", tmp_path / "again")
    again = ["sample", *tuned, "--tuned", weights, "--edit", "a star", "--output", tmp_path / "p", *mine]
    told = tav(*again, fails=True)
    assert "n.safetensors was inverted with other weights than those of --tuned; give the file that" in told
    assert not (tmp_path / "p").exists()
    told = tav(*sample, "--tuned", weights, fails=True)  # random noise, in a folder of other weights
    assert "--tuned" in told and "is another one than that of the project in" in told
    assert "holds a project, which has its tuned weights" in tav(*tune, "--output", tmp_path / "o", fails=True)


@pytest.mark.slow
def test_an_interrupted_tuning_is_kept_and_resumed_to_the_same_weights(clip, tav, tmp_path):
    # so many steps that Ctrl-C comes before the last one; and other memory modes give other last bits
    common = ["tune", *MINI, "--video", clip, "--prompt", "a red ball", "--frames", "2", "--size", "64"]
    common += ["--steps", "30", "--memory", "fast"]
    tav(*common, "--output", tmp_path / "whole")
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tav_core", *map(str, common), "--output", tmp_path / "parts"],
            env=environment(PYTHONUNBUFFERED="1"),
            stderr=log,
            stdout=log,
        )
        while "tuning" not in (tmp_path / "log").read_text() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        code = process.wait(300)
    assert code == 130, (tmp_path / "log").read_text()
    assert "add --resume to go on" in (tmp_path / "log").read_text().splitlines()[-1]
    assert "--resume" in tav(*common, "--output", tmp_path / "parts", fails=True)
    tav(*common, "--output", tmp_path / "parts", "--resume")
    assert {p.name for p in (tmp_path / "parts").iterdir()} == {"tuned.safetensors", "loss.png"}
    from safetensors.torch import load_file

    whole, parts = (load_file(tmp_path / name / "tuned.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_what_a_checkpoint_predicts_can_be_told(clip, tav, tmp_path):
    folder = make_folder(tmp_path / "zero", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    run = ["tune", "--checkpoint", folder, "--video", clip, "--frames", 2, "--size", 32, "--prompt", "a red ball",
           "--steps", 1, "--output", tmp_path / "tuned"]  # fmt: skip
    assert "--prediction-type epsilon tells nothing of a picture in pure noise" in tav(*run, fails=True)
    assert "probe loss" in tav(*run, "--prediction-type", "v_prediction")


@pytest.mark.slow
def test_bad_input_gives_one_clear_line_and_leaves_nothing(clip, edited, tav, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(clip.read_bytes()[:700])
    base = {
        "--checkpoint": "mini",
        "--video": clip,
        "--prompt": "a red ball",
        "--edit": "a blue ball",
        "--output": tmp_path / "out",
        "--frames": 2,
    }
    cases = [
        ({"--video": tmp_path / "none.mp4"}, f"--video {tmp_path / 'none.mp4'} does not exist"),
        ({"--video": broken}, f"--video {broken} can't be decoded"),
        ({"--frames": 99}, "--frames 99 is more than the 8 frames of"),
        ({"--size": "100x128"}, "100"),
        ({"--prompt": " "}, "--prompt"),
        ({"--edit": ""}, "--edit is empty"),
        ({"--checkpoint": tmp_path}, f"--checkpoint {tmp_path} is no diffusers model"),
        ({"--checkpoint": clip}, f"--checkpoint {clip} is not a .safetensors file"),
        ({"--steps": 0}, "steps"),
        ({"--learning-rate": 5}, "--learning-rate 5.0 is out of range"),
        ({"--sampling-steps": 0}, "1000"),
        ({"--attention-injection": 1.5}, "--attention-injection 1.5"),
        ({"--caption-as-negative": -1}, "--caption-as-negative -1"),
        ({"--region": "subject"}, "--region subject needs to know where the subject is; give --contrast,"),
        ({"--contrast": "a red ball"}, "--contrast a red ball says nothing of another subject"),
    ]
    for change, words in cases:
        told = tav("edit", *(x for pair in {**base, **change}.items() for x in pair), fails=True)
        assert len(told.splitlines()) == 1 and words in told, (change, told)
        assert not (tmp_path / "out").exists(), change
    told = tav("invert", "--softness", "-1", fails=True)
    assert told == "error: --softness -1 is out of range; give an integer from 0 to 512"
    sample = ["sample", *MINI, "--edit", "x", "--output", tmp_path]
    tuned = [*sample, "--tuned", edited / "tuned.safetensors", "--noise", edited / "noise.safetensors", *FAST[2:]]
    told = tav(*tuned, "--region", "subject", "--region", "background", fails=True)
    assert "--region has 2 values for 1 --edit" in told
    told = tav(*sample, "--tuned", edited / "noise.safetensors", fails=True)
    assert f"--tuned {edited / 'noise.safetensors'} holds no tuned weights" in told
    told = tav(*tuned, "--caption-as-negative", "0", fails=True)
    assert "inverted with the caption; give it a value above 0" in told


@pytest.mark.parametrize("error", [
    torch.cuda.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                 "to allocate 9 bytes."),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"),
])  # fmt: skip
def test_out_of_memory_gives_one_line_on_every_device(error, monkeypatch, capsys):
    def fail(args):
        raise error

    parser = argparse.ArgumentParser()
    parser.set_defaults(run=fail)
    monkeypatch.setattr("sys.argv", ["tav_core"])
    with pytest.raises(SystemExit) as end:
        terminal.run(parser)
    told = capsys.readouterr().err
    assert (
        end.value.code == 2
        and told.startswith("error: the device ran out of memory; try fewer --frames")
        and told.count("\n") == 1
    )


def test_other_errors_keep_their_traceback(monkeypatch):
    parser = argparse.ArgumentParser()
    parser.set_defaults(run=lambda args: torch.zeros(2) @ torch.zeros(3))
    monkeypatch.setattr("sys.argv", ["tav_core"])
    with pytest.raises(RuntimeError):
        terminal.run(parser)


@pytest.mark.slow
def test_render_makes_the_clip_of_the_world(tmp_path):
    done = tav_process(
        "render", "--shape", "star", "--motion", "bounce", "--output", tmp_path / "a.mp4", module="tav_core.mini"
    )
    assert done.stdout.strip().endswith("a red star is bouncing on the grass")
    truth = world.render_clip(world.clip_scenes(world.Scene("star"), "bounce", 8))
    assert np.abs(load_video(tmp_path / "a.mp4").frames.numpy().astype(int) - truth).mean() < 4
