"""A job and its folder: what is finished is kept, no two runs share it, and what can't be written is seen first."""

import json
import os
import secrets
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from support.commands import environment
from support.errors import refused
from tav_core import Edit, EditJob, load_tuned, load_video, pipeline, read_tuned, run_edit
from tav_core.atomic import atomic_path, sole_user
from tav_core.errors import Cancelled, TavError
from tav_core.events import Note
from tav_core.job import STATE, TUNED_FILES, check_file, check_folder, claimed
from tav_core.kept import Kept
from tav_core.pipeline import check_size
from tav_core.presets import PRESETS, with_settings
from tav_core.visuals import step_strip

PRESET = with_settings(PRESETS["mini"], steps=1, sampling_steps=2, memory="fast")
CLIP = Path(__file__).parents[1] / "tav_core" / "mini" / "demo.mp4"


# ------------------------------------------------------------------------------------------- what is finished


@pytest.fixture(scope="module")
def clip():
    return load_video(CLIP, count=2, width=64, height=64)


def edit_job(*edits: str | Edit, **changes) -> EditJob:
    edits = [edit if isinstance(edit, Edit) else Edit(edit) for edit in edits]
    return replace(EditJob("a red ball", edits, PRESET), **changes)


def drawn(job, checkpoint, clip, folder, stop_after=None, **kwargs) -> list[str]:
    """The labels of what was drawn, until the edit of that name is done."""
    labels, stages = [], []

    def callback(event):
        if isinstance(event, Note):
            labels.extend([event.text.removesuffix(" ...")] * event.text.endswith(" ..."))
        elif stages.append(event.stage) or (event.stage == "sample" and labels[-1] == stop_after):
            raise Cancelled

    try:
        run_edit(job, checkpoint, clip, folder, callback=callback, **kwargs)
    except Cancelled:
        labels.pop()
    return labels + ["inverted"] * ("invert" in stages)


def test_finished_edits_are_not_drawn_again(checkpoint, clip, tmp_path):
    job, (whole, parts) = edit_job("one", "two", "three"), (tmp_path / "whole", tmp_path / "parts")
    assert drawn(job, checkpoint, clip, whole) == ["reconstruction", "one", "two", "three", "inverted"]
    assert drawn(job, checkpoint, clip, parts, stop_after="two") == ["reconstruction", "one", "inverted"]
    assert len(load_video(parts / "edit-1-one.mp4").frames) == 2  # it can be looked at
    assert drawn(job, checkpoint, clip, parts, stop_after="three") == ["two"]
    assert drawn(job, checkpoint, clip, parts) == ["three"]
    assert {path.name for path in parts.iterdir()} == {path.name for path in whole.iterdir()}
    for name in ("edit-1-one.mp4", "edit-3-three.mp4", "reconstruction.mp4"):
        assert torch.equal(load_video(whole / name).frames, load_video(parts / name).frames)


@pytest.mark.slow
@pytest.mark.parametrize("change, again", [
    ({"edits": [Edit("one"), Edit("2")]}, ["2"]),
    ({"edits": [Edit("1"), Edit("two")]}, ["1", "two"]),
    ({"negative_prompt": "bad"}, ["reconstruction", "one", "two", "inverted"]),
    ({"preset": with_settings(PRESET, guidance_scale=3.0)}, ["reconstruction", "one", "two", "inverted"]),
    ({"preset": with_settings(PRESET, save_minutes=1.0)}, ["two"]),
])  # fmt: skip
def test_what_belongs_to_another_job_is_drawn_anew(checkpoint, clip, tmp_path, change, again):
    job = edit_job("one", "two")
    drawn(job, checkpoint, clip, tmp_path, stop_after="two")
    assert drawn(replace(job, **change), checkpoint, clip, tmp_path) == again


@pytest.mark.slow
def test_the_same_edits_at_each_kept_step(checkpoint, clip, tmp_path, monkeypatch):
    shown, preset = [], with_settings(PRESET, steps=2, learning_rate=0.3, keep=[1], probe_size=1)
    monkeypatch.setattr("tav_core.job.step_strip", lambda *args: shown.append(args) or step_strip(*args))
    job = edit_job("one", "two", preset=preset, rank=2)
    first = ["reconstruction", "one", "two", "step 1: one", "inverted"]
    assert drawn(job, checkpoint, clip, tmp_path, stop_after="step 1: two") == first
    assert drawn(job, checkpoint, clip, tmp_path) == ["step 1: two"]  # from the noise that is kept
    assert {path.name for path in tmp_path.iterdir()} == {*job.files} - {STATE}
    ((videos, labels, _),) = shown
    assert list(videos) == [1, 2] and labels == ["one", "two"]
    with Image.open(tmp_path / "strip-steps.png") as picture:
        assert picture.width > 2 * 2 * 128 and picture.height > 2 * 128
    for step, name in ((1, "tuned-1.safetensors"), (2, "tuned.safetensors")):
        info = read_tuned(tmp_path / name)
        assert (info.config["steps"], info.rank, info.num_frames) == (step, 2, 2)
    unet = pipeline.video_unet(checkpoint)
    load_tuned(tmp_path / "tuned-1.safetensors", unet)  # what a user of that file gets
    noise = pipeline.invert(checkpoint, unet, source := pipeline.prepare(checkpoint, clip.frames, "a red ball"), preset)
    again = pipeline.sample(checkpoint, unet, noise, "two", preset, source_prompt=source.prompt)
    near, far = ((videos[step][1].float() - again.float()).abs().mean() for step in (1, 2))
    assert near < 0.01 < 1 < far


def test_a_damaged_part_is_made_anew(tmp_path):
    kept = Kept(tmp_path / "kept", {"seed": 1})
    first = kept("part", lambda: torch.ones(2), of="a")
    assert torch.equal(kept("part", lambda: torch.zeros(2), of="a"), first)
    assert torch.equal(kept("part", lambda: torch.zeros(2), of="b"), torch.zeros(2))
    assert torch.equal(Kept(kept.folder, {"seed": 2})("part", lambda: first, of="b"), first)
    (kept.folder / "part.safetensors").write_bytes(b"spoiled")
    assert torch.equal(kept("part", lambda: torch.zeros(2), of="b"), torch.zeros(2))
    kept.remove()
    assert not list(tmp_path.iterdir())


def test_edits_of_one_sentence_keep_apart(checkpoint, clip, tmp_path):
    drawn(edit_job("one", "one", "source"), checkpoint, clip, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["files"]) == ["reconstruction", "one", "one (2)", "source (3)"]
    assert all((tmp_path / name).exists() for name in summary["files"].values())


def test_a_rate_that_cannot_be_written_is_seen_first(checkpoint, clip, tmp_path):
    refused("fps=0.001 is out of range", edit_job("one"), checkpoint, replace(clip, fps=1e-3), tmp_path, call=run_edit)
    assert not list(tmp_path.iterdir())


def test_sizes_that_no_memory_holds(checkpoint):
    most = 8 * checkpoint.size
    check_size(checkpoint, width=most, height=checkpoint.downscale)
    refused(f"height={most + 8} is more than 8 times the {checkpoint.size} that .* use {most}",
            checkpoint, call=check_size, width=most, height=most + 8)  # fmt: skip


# ------------------------------------------------------------------------------------------------- the folder


def test_one_run_has_a_folder_for_itself(tmp_path):
    (tmp_path / "out").mkdir()
    holder = f"""
import time, pathlib
from tav_core.atomic import sole_user
with sole_user(pathlib.Path({str(tmp_path / "out")!r})):
    print("mine", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", holder], env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "mine\n"
    with pytest.raises(TavError, match="path='.*out' is in use by another run; wait for it"):
        with sole_user(tmp_path / "out"):
            pytest.fail("both have it")
    process.send_signal(signal.SIGKILL)
    process.wait()
    with claimed(tmp_path / "out"), pytest.raises(TavError, match="in use"), sole_user(tmp_path / "out"):
        pass
    with claimed(tmp_path / "out"):  # given back
        assert not list((tmp_path / "out").iterdir())


def test_what_killed_runs_have_left_goes(tmp_path):
    script = f"""
import os, pathlib, signal
from tav_core.atomic import atomic_path
with atomic_path(pathlib.Path({str(tmp_path)!r}) / "a.txt") as temporary:
    temporary.write_text("half")
    (temporary.parent / ".tmpXYZ").write_text("of a library")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], env=environment())
    (left,) = tmp_path.iterdir()
    elsewhere = tmp_path / left.name.replace(left.name[5:13], secrets.token_hex(4))  # of another machine
    elsewhere.mkdir()
    with atomic_path(tmp_path / "b.txt") as mine:
        with atomic_path(tmp_path / "c.txt") as temporary:
            temporary.write_text("whole")
        mine.write_text("whole")  # it is still there
    assert {path.name for path in tmp_path.iterdir()} == {"b.txt", "c.txt", elsewhere.name}


@pytest.mark.skipif(os.name == "nt", reason="folders can't be synced there")
def test_the_folder_is_synced_behind_the_file(tmp_path, monkeypatch):
    done, replace_, sync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda *args: (done.append("replaced"), replace_(*args)))
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.path.isdir(f"/proc/self/fd/{file}")), sync(file)))
    with atomic_path(tmp_path / "a") as temporary:
        temporary.touch()
    assert done == [False, "replaced", True]


@pytest.mark.parametrize("name, told", [
    ("clip.mp4", "path='.*clip.mp4' is what is read from"), ("text", "is a file; choose another path"),
    ("text/below/it", "lies in a file"), ("n" * 256, r"can't be used \(File name too long\)"),
    ("d/" * 2030, r"can't be used \(File name too long\)"),
    ("taken", "holds a folder where tuned.safetensors is to be"),
    ("own", r"is where .*own/source.mp4 lies, which source.mp4 would take the place of"),
    ("link", r"is where .*own/source.mp4 lies"),
])  # fmt: skip
def test_folders_that_cannot_be_written_to(tmp_path, name, told):
    (tmp_path / "text").touch()
    (tmp_path / "taken" / "tuned.safetensors").mkdir(parents=True)
    (tmp_path / "own").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "own")
    video = tmp_path / ("own/source.mp4" if name in ("own", "link") else "clip.mp4")
    video.touch()
    files = [*TUNED_FILES, "source.mp4"]
    with pytest.raises(TavError, match=told) as caught:
        check_folder(tmp_path / name, files, video=video)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    check_folder(tmp_path / "new" / "one", files, video=video)
    assert not (tmp_path / "new").exists()


def test_folders_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    refused("nothing may be written to", tmp_path / "new", TUNED_FILES, call=check_folder)


def test_inputs_must_be_there(tmp_path):
    refused("path='.*none' does not exist", tmp_path, [], video=tmp_path / "none", call=check_folder)
    os.mkfifo(tmp_path / "pipe")
    refused("path='.*pipe' is neither a file nor a folder", tmp_path, [], video=tmp_path / "pipe", call=check_folder)
    refused("path='.*a.txt' doesn't end in .png; give", tmp_path / "a.txt", (".png",), call=check_file)
    check_file(tmp_path / "a.PNG", (".png",))
