"""A job and its folder: what is finished is kept, no two runs share it, and what can't be written is seen first."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support.commands import environment
from support.errors import refused
from tav_core import Edit, EditJob, load_tuned, load_video, lora, pipeline, read_tuned, run_edit, sampling
from tav_core.atomic import atomic_path, sole_user
from tav_core.errors import Cancelled, TavError
from tav_core.events import Note, Step
from tav_core.job import STATE, TUNED_FILES, check_file, check_folder, claimed, done_in
from tav_core.measure import measure_job
from tav_core.pipeline import check_size
from tav_core.presets import PRESETS, with_settings
from tav_core.project import Project, labels
from tav_core.remaining import plan_of
from tav_core.visuals import step_strip

PRESET = with_settings(PRESETS["mini"], steps=1, sampling_steps=2, memory="fast")
CLIP = Path(__file__).parents[1] / "tav_core" / "mini" / "demo.mp4"


# ------------------------------------------------------------------------------------------- what is finished


@pytest.fixture(scope="module")
def clip():
    return load_video(CLIP, count=2, width=64, height=64)


def edit_job(*edits: str | Edit, **changes) -> EditJob:
    edits = [edit if isinstance(edit, Edit) else Edit(edit) for edit in edits]
    return EditJob(**{"prompt": "a red ball", "edits": edits, "preset": PRESET} | changes)


def drawn(job, checkpoint, clip, folder, stop_after=None, **kwargs) -> list[str]:
    """The labels of what was drawn, until the edit of that name is begun, and the stages before it."""
    labels, stages = [], []

    def callback(event):
        if isinstance(event, Note):
            labels.extend([event.text.removesuffix(" ...")] * event.text.endswith(" ..."))
        elif isinstance(event, Step) and (
            stages.append(event.stage) or event.stage == "sample" and labels[-1] == stop_after
        ):
            raise Cancelled

    try:
        run_edit(job, checkpoint, clip, folder, callback=callback, **kwargs)
    except Cancelled:
        labels.pop()
    return labels + [stage for stage in ("tune", "invert") if stage in stages]


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def project(checkpoint, clip, tmp_path_factory) -> Path:
    """A finished project of one edit; a test that changes it copies it."""
    folder = tmp_path_factory.mktemp("project") / "made"
    drawn(edit_job("one"), checkpoint, clip, folder)
    return folder


@pytest.fixture
def copied_project(project, tmp_path) -> Path:
    return shutil.copytree(project, tmp_path / "made")


def test_finished_edits_are_not_drawn_again(checkpoint, clip, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    job = edit_job("one", "two", "three", preset=with_settings(PRESET, edits_at_once=1))
    assert drawn(job, checkpoint, clip, whole) == ["reconstruction", "one", "two", "three", "tune", "invert"]
    assert drawn(job, checkpoint, clip, parts, stop_after="two") == ["reconstruction", "one", "tune", "invert"]
    assert [edit["prompt"] for edit in summary_of(parts)["edits"]] == ["one"]  # it can be looked at
    # nothing is tuned any more
    assert drawn(job, checkpoint, clip, parts, stop_after="three", resume=False) == ["two"]
    assert drawn(job, checkpoint, clip, parts) == ["three"]
    assert {path.name for path in parts.iterdir()} == {path.name for path in whole.iterdir()}
    for name in ("edit-1-one.mp4", "edit-3-three.mp4", "reconstruction.mp4"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()


class Drawn:
    """Which edits are drawn together, by their sentences; of more than `most` at once the memory runs out."""

    def __init__(self):
        self.groups, self.most, self.sample_edits = [], 9, sampling.sample_edits

    def __call__(self, checkpoint, unet, noise, edits, *args, **kwargs):
        self.groups.append(" ".join(edit.prompt for edit in edits))
        if len(edits) > self.most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return self.sample_edits(checkpoint, unet, noise, edits, *args, **kwargs)

    def of(self, *run) -> tuple[list[str], list[str]]:
        """What is drawn together in a run, behind the reconstruction if there is one, and the notes on how many."""
        notes, self.groups = [], []
        run_edit(*run, callback=lambda event: notes.append(event) if isinstance(event, Note) else None)
        groups = [group for group in self.groups if group != run[0].prompt]
        return groups, [note.text for note in notes if note.about == "edits_at_once"]


@pytest.fixture
def together(monkeypatch) -> Drawn:
    monkeypatch.setattr("tav_core.drawing.free_memory", lambda device: 2**40)
    monkeypatch.setattr(sampling, "sample_edits", drawn := Drawn())
    return drawn


def copy_of(project: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(project, folder)


@pytest.mark.slow
def test_edits_that_go_together_are_drawn_together(checkpoint, clip, copied_project, together, monkeypatch):
    unled, run = with_settings(PRESET, attention_injection=0.0), (checkpoint, clip, copied_project)
    five = edit_job("one", "a", "b", "c", "a", "d", "e")
    assert together.of(five, *run) == (["a b c d", "e"], [])  # one is there, a is given twice
    led = edit_job("f", "g", Edit("h", attention_injection=0.2), Edit("i", attention_injection=0.2), "j")
    assert together.of(led, *run) == (["f g", "h i", "j"], [])  # in their order
    assert together.of(edit_job("k", "l", preset=unled), *run)[0] == ["k", "l"]  # no clip walks beside them
    assert [edit["prompt"] for edit in summary_of(copied_project)["edits"]] == ["one", *"abcdefghijkl"]
    several = edit_job(*"mnopq", preset=with_settings(PRESET, edits_at_once=2))
    assert together.of(several, *run) == (["m n", "o p", "q"], [])
    monkeypatch.setattr("tav_core.drawing.free_memory", lambda device: 1e6)
    groups, (note,) = together.of(edit_job("r", "s"), *run)
    assert groups == ["r", "s"] and note.startswith("edits at once: 1, since 2 need about 0.0 GB and 0.0 GB are free")
    monkeypatch.setattr("tav_core.drawing.sampling_memory", lambda unet, latents, text, edits: edits * 3e5)
    groups, (note,) = together.of(edit_job(*"tuvwx"), *run)
    assert groups == ["t u", "v w", "x"] and note.startswith("edits at once: 2, since 3 need about 0.0 GB")


def test_edits_that_run_out_of_memory_are_drawn_in_smaller_groups(checkpoint, clip, project, together, tmp_path):
    job, together.most = edit_job(*"abcdef"), 2
    groups, notes = together.of(job, checkpoint, clip, copy_of(project, tmp_path / "short"))
    assert groups == ["a b c d", "a b", "c d", "e f"]
    assert notes == ["edits at once: 2 from here on, since 4 ran out of memory"]
    apart = replace(job, preset=with_settings(PRESET, edits_at_once=2))
    assert together.of(apart, checkpoint, clip, copy_of(project, tmp_path / "apart")) == (["a b", "c d", "e f"], [])
    for edit in summary_of(tmp_path / "apart")["edits"]:
        assert (tmp_path / "apart" / edit["file"]).read_bytes() == (tmp_path / "short" / edit["file"]).read_bytes()
    together.most = 0
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        together.of(edit_job("g", "h"), checkpoint, clip, tmp_path / "short")
    assert together.groups == ["g h", "g"]


def test_stopped_edits_go_on_with_the_same_ones_together(checkpoint, clip, project, together, tmp_path, monkeypatch):
    job = edit_job(*"abcde", preset=with_settings(PRESET, edits_at_once=2))
    run = (job, checkpoint, clip, whole := copy_of(project, tmp_path / "whole"))
    assert together.of(*run)[0] == ["a b", "c d", "e"]
    wanted = {edit["prompt"]: (whole / edit["file"]).read_bytes() for edit in summary_of(whole)["edits"]}
    assert len(set(wanted.values())) == 6

    def check_rest(parts: Path, groups: list[str]):
        assert [edit["prompt"] for edit in summary_of(parts)["edits"]] == ["one", "a", "b"]
        assert together.of(job, checkpoint, clip, parts)[0] == groups
        found = {edit["prompt"]: (parts / edit["file"]).read_bytes() for edit in summary_of(parts)["edits"]}
        assert found == wanted

    stopped = copy_of(project, tmp_path / "stopped")
    assert drawn(job, checkpoint, clip, stopped, stop_after="d") == ["a", "b", "c"]
    check_rest(stopped, ["c d", "e"])
    assert {path.name for path in stopped.iterdir()} == {path.name for path in whole.iterdir()}
    killed, add, added = copy_of(project, tmp_path / "killed"), Project.add, []

    def add_three(*args):  # a kill while those that were drawn together are written
        if len(added) == 3:
            raise KeyboardInterrupt
        added.append(add(*args))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Project, "add", add_three)
        together.of(job, checkpoint, clip, killed)
    check_rest(killed, ["c d", "e"])


def test_edits_are_added_to_a_project_and_replace_nothing(checkpoint, clip, copied_project):
    before = {path.name: path.read_bytes() for path in copied_project.iterdir() if path.suffix != ".html"}
    more = edit_job("one", "two", Edit("one", guidance_scale=3.0), "one", "<b>")
    assert drawn(more, checkpoint, clip, copied_project) == ["two", "guidance scale 3: one", "<b>"]
    after = {path.name: path.read_bytes() for path in copied_project.iterdir()}
    kept = before.keys() - {"summary.json", "strip.png", "comparison.mp4"}
    assert all(after[name] == before[name] for name in kept) and "edit-1-one.mp4" in kept
    summary = summary_of(copied_project)
    told = [(edit["number"], edit["file"], edit["guidance_scale"]) for edit in summary["edits"]]
    assert told == [(1, "edit-1-one.mp4", 5.0), (2, "edit-2-two.mp4", 5.0), (3, "edit-3-one.mp4", 3.0),
                    (4, "edit-4-b.mp4", 5.0)]  # fmt: skip
    assert labels(summary["edits"]) == ["guidance scale 5: one", "two", "guidance scale 3: one", "<b>"]
    assert len(load_video(copied_project / "comparison.mp4").frames[0]) > 2 * len(clip.frames[0])  # two rows of tiles
    assert "grids" not in summary  # it is no whole table
    page = (copied_project / "index.html").read_text()
    assert "4. &lt;b&gt;" in page and "<b>" not in page and all(edit["file"] in page for edit in summary["edits"])
    (copied_project / "edit-2-two.mp4").unlink()  # takes it out
    assert drawn(edit_job("three"), checkpoint, clip, copied_project) == ["three"]
    assert [edit["number"] for edit in summary_of(copied_project)["edits"]] == [1, 3, 4, 5]


def test_loras_of_edits_are_made_part_of_the_weights_once(checkpoint, clip, copied_project, tmp_path, monkeypatch):
    name, baked = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k", []
    pair = {f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(32, 2)}
    save_file(pair, tmp_path / "soft.safetensors")

    def spied(model, weights, strength, changed=lora._changed):
        baked.append(strength)
        return changed(model, weights, strength)

    monkeypatch.setattr(lora, "_changed", spied)
    job = edit_job("one", loras=[(tmp_path / "soft.safetensors", 0.5)])
    job.check_fits(checkpoint, *clip.frames.shape[:3])
    assert not baked
    assert drawn(job, checkpoint, clip, copied_project)[0].startswith("lora soft:0.5") and baked == [0.5]
    odd = replace(job, loras=[*job.loras, (tmp_path / "none.safetensors", 1.0)])
    refused("loras=.*none.safetensors' does not exist", checkpoint, *clip.frames.shape[:3], call=odd.check_fits)


def test_an_edit_from_fresh_noise_is_measured_as_well(checkpoint, clip, copied_project):
    """Its seed doesn't make it one of random noise, which has no source."""
    job = edit_job(Edit("one", seed=7), preset=with_settings(PRESET, eta=0.5))
    assert drawn(job, checkpoint, clip, copied_project) == ["seed 7, eta 0.5: one"]
    rows, videos, _ = measure_job(copied_project)
    assert [row.name for row in rows] == ["one", "seed 7, eta 0.5: one"] and len(videos) == 2


def test_what_is_left_to_do_in_a_project(checkpoint, clip, project, tmp_path):
    job = edit_job("two", Edit("three", guidance_scale=1.0))
    assert done_in(tmp_path / "new", job, checkpoint, clip) == set()
    done = done_in(project, job, checkpoint, clip)
    assert done == {"encode", "tune", "invert", "reconstruction"}
    seen = []
    run_edit(job, checkpoint, clip, shutil.copytree(project, tmp_path / "made"), callback=seen.append)
    steps = sum(event.videos for event in seen if isinstance(event, Step) and event.stage == "sample")
    (stage,) = plan_of(job, done).stages
    assert (stage.name, stage.steps) == ("sample", steps) and seen[0] == plan_of(job, done)


def test_edits_of_one_sentence_in_two_regions_are_two(checkpoint, clip, tmp_path):
    mask = torch.zeros(2, 64, 64)
    mask[:, :32] = 1
    job = edit_job(Edit("one", "subject"), Edit("one", "background"), mask=mask, softness=0)
    drawn(job, checkpoint, clip, tmp_path)
    first, second = summary_of(tmp_path)["edits"]
    assert labels([first, second]) == ["region subject: one", "region background: one"]
    above, below = (load_video(tmp_path / edit["file"]).frames.float() for edit in (first, second))
    source = clip.frames.float()
    assert (above[:, 48:] - source[:, 48:]).abs().mean() < 8 < (below[:, 48:] - source[:, 48:]).abs().mean()
    rows, _, _ = measure_job(tmp_path)
    assert [row.name for row in rows] == ["region subject: one", "region background: one"]
    assert all(row.figures["psnr_rest"] > 30 for row in rows)
    refused("mask is another one than that of the project", replace(job, mask=1 - mask), checkpoint, clip, tmp_path,
            call=run_edit)  # fmt: skip


@pytest.mark.parametrize("change, told", [
    ({"prompt": "a blue ball"}, "prompt='a blue ball' is not the a red ball of the project in .*; choose another path"),
    ({"preset": with_settings(PRESET, learning_rate=1e-3)}, "learning_rate=0.001 is not the 0.002 of the project"),
    ({"preset": with_settings(PRESET, steps=2)}, "steps=2 is not the 1 of the project"),
    ({"preset": with_settings(PRESET, context_length=5)}, "context_length=5 is given, and there is none in the"),
    ({"preset": with_settings(PRESET, seed=7)}, "seed=7 is not the 0 of the project in .*; give eta and edit_seed to"),
    ({"preset": with_settings(PRESET, sampling_steps=3)}, "sampling_steps=3 is not the 2 that .* was inverted with"),
    ({"inflation": {"norm": "frame"}}, "norm='frame' is not the video of the project"),
])  # fmt: skip
def test_another_tuning_is_refused(checkpoint, clip, project, change, told):
    before, job = {path: path.stat().st_mtime_ns for path in project.iterdir()}, replace(edit_job("two"), **change)
    refused(told, job, checkpoint, clip, project, call=run_edit)
    refused(told, project, job, checkpoint, clip, call=done_in)
    assert before == {path: path.stat().st_mtime_ns for path in project.iterdir()}


def test_other_clips_weights_and_summaries_are_refused(checkpoint, clip, copied_project):
    def told(problem, **changes):
        refused(problem, edit_job("two"), checkpoint, replace(clip, **changes), copied_project, call=run_edit)

    told("path is another one than that of the project", frames=255 - clip.frames)
    (weights,) = [copied_project / "tuned.safetensors"]
    tensors, metadata = load_file(weights), safe_open(weights, "pt").metadata()
    save_file({name: tensor + 1e-3 for name, tensor in tensors.items()}, weights, metadata)
    told("tuned.safetensors' is another one than that of the project .*; bring back those")
    for damaged in ("{", "[]", '{"edits": [{"number": 1}]}', '{"files": {}}'):
        (copied_project / "summary.json").write_text(damaged)
        told("holds a summary.json that is no project's, or an earlier version's")
    (copied_project / "summary.json").unlink()
    told("path='.*made' holds tuned weights of no project; choose another path, or overwrite them")


@pytest.mark.slow
def test_the_same_edits_at_each_kept_step(checkpoint, clip, tmp_path, monkeypatch):
    shown, preset = [], with_settings(PRESET, steps=2, learning_rate=0.3, keep=[1], probe_size=1)
    monkeypatch.setattr("tav_core.job.step_strip", lambda *args: shown.append(args) or step_strip(*args))
    job = edit_job("one", "two", preset=preset, rank=2)
    run_edit(job, checkpoint, clip, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*job.files(), "step-1"} - {STATE, "subject.mp4"}
    ((videos, told, _),) = shown
    assert list(videos) == [1, 2] and told == ["one", "two"]
    with Image.open(tmp_path / "strip-steps.png") as picture:
        assert picture.width > 2 * 2 * 128 and picture.height > 2 * 128
    for step, name in ((1, "tuned-1.safetensors"), (2, "tuned.safetensors")):
        info = read_tuned(tmp_path / name)
        assert (info.config["steps"], info.rank, info.num_frames) == (step, 2, 2)
    unet = pipeline.video_unet(checkpoint)
    load_tuned(tmp_path / "tuned-1.safetensors", unet)  # what a user of that file gets
    noise = pipeline.invert(checkpoint, unet, source := pipeline.prepare(checkpoint, clip.frames, "a red ball"), preset)
    again = sampling.sample(checkpoint, unet, noise, "two", preset, source_prompt=source.prompt)
    near, far = ((videos[step][1].float() - again.float()).abs().mean() for step in (1, 2))
    assert near < 0.01 < 1 < far

    steps = []  # nothing of it is done again, and steps that weren't kept are told
    run_edit(
        job, checkpoint, clip, tmp_path, callback=lambda event: steps.append(event) if isinstance(event, Step) else 0
    )
    assert {step.stage for step in steps} <= {"encode"}
    other = replace(job, preset=with_settings(preset, keep=[]))
    run_edit(other, checkpoint, clip, tmp_path)
    refused("rank=1 is not the 2 of the project", replace(job, rank=1), checkpoint, clip, tmp_path, call=run_edit)
    run_edit(replace(other, edits=job.edits[:1]), checkpoint, clip, tmp_path, overwrite=True)
    assert not [path for path in tmp_path.iterdir() if "step" in path.name or path.name == "tuned-1.safetensors"]


def test_overwrite_begins_a_project_anew(checkpoint, clip, copied_project):
    (copied_project / "notes.txt").touch()
    job = edit_job("two", preset=with_settings(PRESET, seed=1))
    assert drawn(job, checkpoint, clip, copied_project, overwrite=True) == ["reconstruction", "two", "tune", "invert"]
    assert [edit["file"] for edit in summary_of(copied_project)["edits"]] == ["edit-1-two.mp4"]
    assert not (copied_project / "edit-1-one.mp4").exists() and (copied_project / "notes.txt").exists()
    (copied_project / "summary.json").write_text("{}")
    assert "tune" in drawn(job, checkpoint, clip, copied_project, overwrite=True)


def test_overwrite_removes_nothing_for_what_cannot_be(checkpoint, clip, copied_project):
    before = sorted(path.name for path in copied_project.iterdir())
    refused("bal.*is not in", edit_job("two", word="bal"), checkpoint, clip, copied_project, overwrite=True,
            call=run_edit)  # fmt: skip
    published = replace(checkpoint, unet=pipeline.video_unet(checkpoint))
    refused("is a Tune-A-Video model, inflated with", edit_job("two", inflation={"norm": "frame"}), published, clip,
            copied_project, overwrite=True, call=run_edit)  # fmt: skip
    assert sorted(path.name for path in copied_project.iterdir()) == before


def test_another_mask_makes_another_edit(checkpoint, clip, tmp_path):
    mask = torch.zeros(2, 64, 64)
    mask[:, :32] = 1
    job = edit_job(Edit("one", "subject"), mask=mask, softness=0)
    drawn(job, checkpoint, clip, tmp_path)
    (tmp_path / "subject.mp4").unlink()  # so that it can be told anew
    assert "one" in " ".join(drawn(replace(job, mask=1 - mask), checkpoint, clip, tmp_path))
    first, second = summary_of(tmp_path)["edits"]
    assert labels([first, second])[1] == f"mask {second['mask']}: one" and first["mask"] != second["mask"]
    changed = (load_video(tmp_path / second["file"]).frames.float() - clip.frames.float()).abs()
    assert changed[:, :16].mean() < 8 < changed[:, 48:].mean()


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
