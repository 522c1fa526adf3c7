"""An evaluation: what of it is done, and done again, after a kill, with broken clips, and what it writes of figures."""

import csv
import json
import math
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from support.datasets import make_tgve
from support.errors import refused
from tav_core.dataset import read_dataset
from tav_core.errors import TavError
from tav_core.evaluation import (
    Frames,
    check_settings,
    edit_all,
    is_done,
    jobs_of,
    measure_all,
    summed_up,
    write_evaluation,
)
from tav_core.events import DDIMStep, Note
from tav_core.measure import MODELS, Measured, Models
from tav_core.metrics import psnr
from tav_core.noise import read_noise
from tav_core.presets import PRESETS, with_settings
from tav_core.sampling import Edit
from tav_core.video import load_video

PRESET = with_settings(PRESETS["paper"], steps=1, sampling_steps=1, memory="fast")
FRAMES = Frames(32, 32)
KINDS = ("style", "object", "background", "multiple")


@pytest.fixture
def dataset(tmp_path) -> Path:
    return make_tgve(tmp_path / "tgve")


def jobs(dataset: Path, kinds=KINDS[:2], **changes):
    entries = [replace(entry, edits={kind: entry.edits[kind] for kind in kinds}, **changes)
               for entry in read_dataset(dataset, 8).entries]  # fmt: skip
    found, faults = jobs_of(entries, PRESET, {}, dataset.parent / "out")
    assert not faults
    return found


def edited(wanted, checkpoint, output, at=lambda begun, event: None) -> tuple[list[str], dict[str, str]]:
    """The clips that were begun, and why which failed."""
    begun = []

    def callback(event):
        if isinstance(event, Note) and (told := re.fullmatch(r"\d of \d, (\S+) \.\.\.", event.text)):
            begun.append(told[1])
        at(begun, event)

    failed = edit_all(wanted, checkpoint, output, FRAMES, callback)
    return begun, failed


def files(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*.jpg"))}


@pytest.fixture
def run(monkeypatch) -> list:
    """The jobs that are run, without any model: an edit is grey."""
    done = []

    def run_edit(job, checkpoint, clip, folder, callback):
        done.append(job)
        return {}, [torch.full_like(clip.frames, 128) for _ in job.edits]

    monkeypatch.setattr("tav_core.evaluation.run_edit", run_edit)
    return done


def test_a_killed_run_goes_on_and_does_only_what_is_missing(dataset, checkpoint, tmp_path):
    wanted, out = jobs(dataset, ("style",))[:2], tmp_path / "out"
    first, second = wanted
    edited([second], checkpoint, tmp_path / "whole")
    child = os.fork()
    if child == 0:
        seen = []

        def kill(begun, event):  # while the edit of the second clip is drawn, after its reconstruction
            seen.append(len(begun) == 2 and isinstance(event, DDIMStep) and event.stage == "sample")
            if sum(seen) == 3:  # behind the reconstruction and the walk back
                os.kill(os.getpid(), signal.SIGKILL)

        edited(wanted, checkpoint, out, kill)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert is_done(first, out) and not is_done(second, out)
    assert (out / "runs" / second.name / "reconstruction.mp4").exists()  # its tuning is not done again
    before = files(out / "frames" / first.name)
    assert edited(wanted, checkpoint, out) == ([second.name], {})
    names = [f"{clip.name}/style/0000{number}.jpg" for clip in wanted for number in (0, 1)]
    assert list(files(out / "frames")) == names  # as run_eval.py of LOVEU-TGVE wants them
    assert files(out / "frames" / first.name) == before
    assert files(out / "frames" / second.name) == files(tmp_path / "whole" / "frames" / second.name)
    assert edited(wanted, checkpoint, out) == ([], {})


def test_a_broken_clip_ends_no_other(dataset, checkpoint, tmp_path, run, monkeypatch):
    wanted, out = jobs(dataset), tmp_path / "out"
    whole = wanted[1].entry.video / "00001.jpg"
    content = whole.read_bytes()
    whole.write_bytes(content[: len(content) // 2])
    begun, failed = edited(wanted, checkpoint, out)
    assert begun == [clip.name for clip in wanted] and list(failed) == [begun[1]]
    assert "can't be read as an image" in failed[begun[1]]
    assert [is_done(clip, out) for clip in wanted] == [True, False, True]
    whole.write_bytes(content)
    with monkeypatch.context() as broken:
        broken.setattr("tav_core.evaluation.run_edit", lambda *args, **kwargs: 1 / 0)  # what nobody foresaw
        told = out / "runs" / begun[1] / "error.txt"
        why = f"ZeroDivisionError: division by zero (see {told})"
        assert edited(wanted, checkpoint, out) == ([begun[1]], {begun[1]: why})
        assert "Traceback" in told.read_text()
    assert edited(wanted, checkpoint, out) == ([begun[1]], {})


def test_a_full_disk_ends_the_run(dataset, checkpoint, tmp_path, run, monkeypatch):
    def full(*args, **kwargs):
        raise TavError("output", tmp_path, "can't be written (No space left on device)", "free space")

    monkeypatch.setattr("tav_core.evaluation.run_edit", full)
    refused("No space left", jobs(dataset), checkpoint, tmp_path / "out", call=edited)


def test_edits_of_a_clip_are_drawn_by_one_job(dataset, checkpoint, tmp_path, run):
    """So that it draws them together; each has its own frames."""
    (first, *_), out = jobs(dataset), tmp_path / "out"
    assert edited([first], checkpoint, out) == ([first.name], {})
    assert [[*job.edits] for job in run] == [[*first.entry.edits.values()]] and len(first.entry.edits) == 2
    folders = {path.rsplit("/", 1)[0] for path in files(out / "frames")}
    assert folders == {f"{first.name}/{kind}" for kind in first.entry.edits}


def test_what_has_changed_is_done_anew(dataset, checkpoint, tmp_path, run):
    (first, *_), out = jobs(dataset), tmp_path / "out"
    edited([first], checkpoint, out)
    entry = first.entry
    assert is_done(replace(first, entry=replace(entry, edits={"style": entry.edits["style"]})), out)  # a part of it
    for change in ({"prompt": "a ball"}, {"edits": entry.edits | {"style": Edit("a star")}}, {"count": 1},
                   {"edits": entry.edits | {"more": Edit("a star")}}):  # fmt: skip
        assert not is_done(replace(first, entry=replace(entry, **change)), out)
    (again, *_) = jobs(dataset, count=1)
    assert edited([again], checkpoint, out)[0] == [first.name] and is_done(again, out)
    assert len(files(out)) == 2  # and none of the frames before
    (out / "frames" / first.name / "style" / "00000.jpg").unlink()
    assert not is_done(again, out)


def test_an_unfinished_clip_whose_sentence_changed_is_done_anew(dataset, checkpoint, tmp_path, run, monkeypatch):
    (first, *_), (again, *_), out = jobs(dataset), jobs(dataset, prompt="a ball"), tmp_path / "out"
    unfinished, found = out / "runs" / first.name / "tuning-state.safetensors", []

    def stopped(job, checkpoint, clip, folder, callback):
        found.append(unfinished.exists())
        unfinished.touch()
        raise TavError("memory", "low", "ran out of memory", "use fewer frames")

    with monkeypatch.context() as once:
        once.setattr("tav_core.evaluation.run_edit", stopped)
        for _ in range(2):
            assert list(edited([first], checkpoint, out)[1]) == [first.name] and not is_done(first, out)
    assert found == [False, True]  # the same one goes on
    assert edited([again], checkpoint, out) == ([first.name], {}) and is_done(again, out)
    assert not unfinished.exists()


def test_long_clips_are_seen_in_windows(dataset, checkpoint, tmp_path, run, monkeypatch):
    (first, *_) = jobs(dataset)
    image = next(first.entry.video.iterdir())
    for number in range(2, 6):
        shutil.copy(image, first.entry.video / f"{number:05}.jpg")
    monkeypatch.setattr("tav_core.evaluation.WINDOW", 4)
    few = with_settings(PRESET, context_length=5, context_overlap=2)
    asked, usual = replace(few, tuning=replace(few.tuning, context_length=6)), replace(few, tuning=PRESET.tuning)
    cases = ((None, usual, 4), (4, usual, None), (5, usual, 4), (None, few, 5), (6, asked, None))
    for number, (count, preset, window) in enumerate(cases):
        clip = replace(first, entry=replace(first.entry, count=count), job=replace(first.job, preset=preset))
        edited([clip], checkpoint, tmp_path / f"out{number}")
        assert run[-1].preset.tuning.context_length == window
        assert len(files(tmp_path / f"out{number}")) == 2 * (count or 6)


def test_settings_of_a_folder_are_not_mixed(checkpoint, tmp_path):
    check_settings(tmp_path, PRESET, {"norm": "video"}, checkpoint, FRAMES)
    same = with_settings(PRESET, memory="low", save_minutes=9.0, edits_at_once=2)
    check_settings(tmp_path, same, {"norm": "video"}, checkpoint, FRAMES)
    for told, preset, frames in (
        ("other settings .tuning steps 1, now 2.; choose another", with_settings(PRESET, steps=2), FRAMES),
        ("guidance_scale 12.5, now 3.0", with_settings(PRESET, guidance_scale=3.0), FRAMES),
        ("frames width 32, now 64", PRESET, Frames(64, 32)),
    ):
        refused(told, tmp_path, preset, {"norm": "video"}, checkpoint, frames, call=check_settings)


def test_figures_are_measured_once_of_the_written_frames(checkpoint, tmp_path, monkeypatch):
    """Those of a list with a mask and a region: outside of it the clip's own pixels stay, and are measured there."""
    shown = torch.zeros(32, 32, dtype=torch.uint8)
    shown[:, :16] = 255
    Image.fromarray(shown.numpy()).save(tmp_path / "mask.png")
    frames, out = make_tgve(tmp_path / "tgve") / "DAVIS_480p" / "480p_frames" / "stunt", tmp_path / "out"
    clip = f"- {{video: {frames}, prompt: a ball, edits: {{own: a star, any: a star}}, mask: mask.png, "
    (tmp_path / "clips.yaml").write_text(clip + "region: {own: subject}, softness: 0, frames: 2}")
    wanted, faults = jobs_of(read_dataset(tmp_path, 8).entries, PRESET, {}, out)
    assert not faults and edited(wanted, checkpoint, out) == (["stunt"], {})
    rows, failed = measure_all(wanted, out, Models(), {"clip": "None"})
    assert not failed and [row.name for row in rows] == ["stunt/own", "stunt/any"]
    assert rows[0].figures["psnr_rest"] > 35 > rows[1].figures["psnr_rest"]  # but for what JPEG leaves of them
    drawn = load_video(out / "frames" / "stunt" / "any").frames
    source = read_noise(out / "runs" / "stunt" / "noise.safetensors").frames
    assert rows[1].figures["psnr_rest"] == psnr(drawn, source)
    noted = out / "runs" / "stunt" / "figures.json"  # as an earlier version wrote it, which knew fewer models
    noted.write_text(json.dumps(json.loads(noted.read_text()) | {"models": dict.fromkeys(MODELS[:3], "None")}))
    monkeypatch.setattr("tav_core.evaluation.measure", lambda *args: 1 / 0)
    again, failed = measure_all(wanted, out, Models(), {"clip": "None"})
    assert not failed and [row.figures.keys() for row in again] == [row.figures.keys() for row in rows]
    for others in ({"clip": "mini"}, {"raft": "a.pth"}):
        rows, failed = measure_all(wanted, out, Models(), others)
        assert not rows and failed["stunt"].startswith("ZeroDivisionError")
    (job,), other = wanted, Edit("a moon", "subject")
    changed = replace(job, entry=replace(job.entry, edits=job.entry.edits | {"own": other}),
                      job=replace(job.job, edits=[other, *job.job.edits[1:]]))  # fmt: skip
    assert edited([changed], checkpoint, out) == (["stunt"], {})
    assert measure_all([changed], out, Models(), {"clip": "None"})[1]["stunt"].startswith("ZeroDivisionError")  # anew


def test_means_of_kinds_and_of_all(tmp_path):
    rows = [Measured(f"DAVIS_480p/{name}/{kind}", "x", {"tgve_text": text, "psnr_rest": psnr}, {"tgve_text": 1.0})
            for name, kind, text, psnr in (("a", "style", 20.0, 10.0), ("a", "object", 30.0, math.inf),
                                           ("<b>", "style", 40.0, 30.0))]  # fmt: skip
    style, object_, everything = summed_up(rows)
    assert (style.name, object_.name, everything.name) == ("style", "object", "all")
    assert style.figures == {"tgve_text": 30.0, "psnr_rest": 20.0} and object_.figures == {"tgve_text": 30.0}
    assert everything.figures == {"tgve_text": 30.0, "psnr_rest": 20.0} and everything.of_source == {"tgve_text": 1.0}
    write_evaluation(rows, {"videvo_480p/lotus": "broken <clip>"}, tmp_path)
    lines = list(csv.DictReader((tmp_path / "summary.csv").read_text().splitlines()))
    assert [(line["video"], line["prompt"], line["tgve_text"]) for line in lines][2] == ("all", "3 edits", "30.0")
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 4
    told = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert told["failed"] == {"videvo_480p/lotus": "broken <clip>"} and len(told["means"]) == 3
    page = (tmp_path / "metrics.html").read_text()
    assert 'src="runs/DAVIS_480p/a/strip.png"' in page and "broken &lt;clip&gt;" in page and "<b></h2>" not in page


@pytest.mark.slow
def test_the_command(dataset, tav, tmp_path):
    run = [
        "evaluate",
        "--checkpoint",
        "mini",
        "--dataset",
        dataset,
        "--output",
        tmp_path / "out",
        "--steps",
        1,
        "--sampling-steps",
        1,
    ]
    run += ["--size", 32, "--clip", "mini"]
    (dataset / "youtube_480p" / "480p_frames" / "salsa" / "00000.jpg").write_bytes(b"spoiled")
    told = tav(*run, "--kinds", "object", "--only", "stunt", "youtube_480p", fails=True)
    assert told.splitlines()[-1].startswith("error: --dataset ") and "has clips that failed, 1 of 2" in told
    (line,) = csv.DictReader((tmp_path / "out" / "metrics.csv").read_text().splitlines())
    assert line["video"] == "DAVIS_480p/stunt/object" and -100 <= float(line["tgve_text"]) <= 100
    out = tav(*run, "--kinds", "object", "--only", "stunt")
    assert (
        ["object", "all"] in [line.split() for line in out.splitlines()] and "tgve_frame" in out and "failed" not in out
    )
    assert "other settings (guidance_scale 5.0, now 4.0)" in tav(*run, "--guidance-scale", 4, fails=True)
    (tmp_path / "clips.yaml").write_text("- {video: none.mp4, prompt: a, edits: {a: b}}\n- 3")
    run[4] = tmp_path / "clips.yaml"
    told = tav(*run, fails=True).splitlines()
    assert len(told) == 3 and "clip 2: is a number" in told[0] and "none: video" in told[1] and "2 faults" in told[2]
    (tmp_path / "clips.yaml").write_text("- {video: a.jpg, prompt: a, edits: {a: b}, subject: tree}")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.jpg")
    assert "a: subject tree is not in the sentence" in tav(*run, fails=True)
    assert "subject" not in tav(*run, "--only", "b", fails=True)
