"""Batches: lists that are read, or refused as a whole; a real Ray of this machine, and what happens to its workers."""

import csv
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from support import ROOT
from support.batch_workers import Stub, made_short_of_memory
from support.commands import environment
from support.datasets import make_tgve
from support.errors import refused
from tav_core import cli, load_checkpoint, run_edit
from tav_core.batch.jobs import combination, comparable, expanded, read_jobs, read_sweep, spec_of
from tav_core.batch.worker import Worker
from tav_core.errors import TavError
from tav_core.evaluation import Frames, jobs_of
from tav_core.measure import MODELS
from tav_core.mini import world
from tav_core.presets import PRESETS, with_settings
from tav_core.video import save_video

LIST = """
defaults:
  prompt: a red ball is sliding on the grass
  edits: {style: "a red ball is sliding on the grass, cartoon"}
  frames: 2
  settings: {steps: 2, sampling_steps: 2}
jobs:
"""


@pytest.fixture(scope="module", autouse=True)
def surroundings():
    """Of all clusters of this module: a secret, which Ray would leave in the home folder otherwise; and workers that
    don't give way to other programs, as Ray's do, or those of other tests would take all of a small machine.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        yield


def write_list(folder: Path, *jobs: str, name: str = "jobs.yaml") -> Path:
    (folder / name).write_text(LIST + "\n".join(f"- {job}" for job in jobs))
    return folder / name


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    frames = world.render_clip(world.clip_scenes(world.Scene(), "slide", 4), 32)
    path = tmp_path_factory.mktemp("clip") / "ball.mp4"
    save_video(torch.from_numpy(frames), path, 8)
    return path


# ------------------------------------------------------------------------------------------------------ lists


def test_a_job_wins_over_the_defaults_and_a_table_says_the_same(tmp_path):
    path = write_list(tmp_path, "{video: a.mp4, settings: {steps: 5}, size: 64x32}", "{video: b.mp4, prompt: a cat}")
    jobs, faults = read_jobs(path)
    assert not faults and [job.entry.name for job in jobs] == ["a", "b"]
    assert jobs[0].entry.settings == {"steps": 5, "sampling_steps": 2} and jobs[0].size == (64, 32)
    assert jobs[1].entry.prompt == "a cat" and jobs[1].size is None
    (tmp_path / "table").mkdir()
    table = tmp_path / "table" / "jobs.csv"
    table.write_text(
        "video,prompt,edits.style,frames,settings.steps,settings.sampling_steps,size\n"
        '../a.mp4,a red ball is sliding on the grass,"a red ball is sliding on the grass, cartoon",2,5,2,64x32\n'
        "../b.mp4,a cat,a cartoon cat,2,,2,\n"
    )
    same, faults = read_jobs(table.parent)
    assert not faults and same[0].entry.settings == jobs[0].entry.settings and same[0].size == (64, 32)
    assert same[0].entry.edits == jobs[0].entry.edits and same[1].entry.settings == {"sampling_steps": 2}


def test_every_fault_of_every_job_is_told_at_once(tmp_path, clip, tav):
    path = write_list(tmp_path, f"{{video: {clip}, size: large, fit: wide}}", "{video: none.mp4, sise: 3}",
                      "just text", f"{{video: {clip}, name: c, settings: {{steps: 0}}}}",
                      f"{{video: {clip}, name: d, size: 33}}")  # fmt: skip
    told = tav("batch", path, "--checkpoint", "mini", "--output", tmp_path / "out", fails=True).splitlines()
    assert [line.split(": ")[0] for line in told[:-1]] == ["jobs.yaml, clip 1"] * 2 + [
        "jobs.yaml, clip 2 (none.mp4)", "jobs.yaml, clip 3", "c"]  # fmt: skip
    assert told[-1] == f"error: JOBS {path} can't be used as it is (5 faults); put them right"
    path = write_list(tmp_path, f"{{video: {clip}, name: d, size: 33}}")
    assert "d: width 33" in tav("batch", path, "--checkpoint", "mini", "--output", tmp_path / "out", fails=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, told", [
    ("just text", "is no list of jobs"), ("{jobs: [], clips: []}", "is no list of jobs"),
    ("[", "can't be read as YAML"), ("{defaults: [], jobs: []}", "is no list of jobs"),
])  # fmt: skip
def test_files_that_are_no_lists(tmp_path, content, told):
    (tmp_path / "jobs.yaml").write_text(content)
    refused(told, tmp_path, call=read_jobs)
    (tmp_path / "jobs.csv").touch()
    refused("holds several of jobs.yaml", tmp_path, call=read_jobs)
    refused("does not exist", tmp_path / "none.yaml", call=read_jobs)


def test_a_sweep_is_a_job_for_each_combination_and_an_edit_where_nothing_is_tuned(tmp_path):
    preset = PRESETS["paper"]
    sweep = read_sweep(["learning_rate=1e-5,3e-5", "steps=200,500,200", "guidance_scale=5,10.5"], preset)
    assert sweep == {"learning_rate": [1e-5, 3e-5], "steps": [200, 500], "guidance_scale": [5, 10.5]}
    jobs, _ = read_jobs(write_list(tmp_path, "{video: a.mp4}"))
    found = list(expanded(jobs, sweep))
    assert [job.entry.name for job in found][:2] == [
        "a/learning_rate-1e-05_steps-200",
        "a/learning_rate-1e-05_steps-500",
    ]
    assert len(found) == 4 and found[3].entry.settings == {"steps": 500, "learning_rate": 3e-5, "sampling_steps": 2}
    assert {kind: edit.guidance_scale for kind, edit in found[0].entry.edits.items()} == {
        "style_guidance_scale-5": 5, "style_guidance_scale-10.5": 10.5}  # fmt: skip
    told = combination(found[1].entry.name, "style_guidance_scale-10.5", sweep)
    assert told == "learning_rate 1e-05, steps 500, guidance_scale 10.5"
    sweep = read_sweep(["sampling_steps=25,50", "steps=50,200", "attention_injection=0.5,0"], preset)
    told = {combination(job.entry.name, kind, sweep) for job in expanded(jobs, sweep) for kind in job.entry.edits}
    assert told == {f"sampling_steps {a}, steps {b}, attention_injection {c:g}"
                    for a in (25, 50) for b in (50, 200) for c in (0.5, 0)}  # fmt: skip
    for text, why in (
        ("steps", "has no values"),
        ("keep=1,2", "has several values itself"),
        ("max_grad_norm=x", "is out of range"),
        ("steps=x", "is out of range"),
        ("stops=1,2", "is no setting"),
    ):
        refused(why, [text], preset, call=read_sweep)
    refused("comes twice", ["steps=1", "steps=2"], preset, call=read_sweep)


def test_settings_that_change_no_result_make_no_other_job():
    def compared(**settings):
        preset = asdict(with_settings(PRESETS["mini"], **settings))
        entry = {"video": "/a/clip.mp4", "mask": None, "settings": {}}
        return comparable({"entry": entry, "preset": preset, "inflation": {}, "frames": {}, "checkpoint": {}})

    assert compared(edits_at_once=2, memory="low") == compared() != compared(guidance_scale=3.0)


@pytest.mark.slow
def test_settings_put_back_are_measured_of_the_first_video(clip, folder, tmp_path):
    """And a job that is done anew takes those of a sweep, which lie below it, not with it."""
    settings = {"checkpoint": str(folder), "output": str(tmp_path), "layout": "project", "device": "cpu", "threads": 1}
    settings |= dict.fromkeys([*MODELS, "batch", "prediction_type"]) | {"prompt_weights": False}
    settings |= {"added": {"lora": [], "embedding": []}}
    worker = Worker(settings)
    assert "fault" not in (told := worker.hello()), told
    path, preset = write_list(tmp_path, f"{{video: {clip}, name: a}}"), PRESETS["paper"]
    swept = tmp_path / "jobs" / "a" / "steps-3" / "job.json"
    swept.parent.mkdir(parents=True)
    swept.touch()

    def file_of(**settings):
        entries = [job.entry for job in read_jobs(path)[0]]
        ((job,), _) = jobs_of(entries, with_settings(preset, **settings), {}, tmp_path)
        told = worker.run(spec_of(job, Frames(32, 32), {}) | {"memory": None})
        assert told["status"] == "done", told
        return json.loads((tmp_path / "jobs" / "a" / "job.json").read_text())["result"]["edits"][0]["file"]

    first, second = file_of(), file_of(guidance_rescale=0.7)
    assert first != second and file_of() == first
    assert file_of(learning_rate=1e-5).startswith("edit-1-") and swept.exists()


def test_without_ray_one_sentence_says_what_to_install(tmp_path, clip, tav, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    told = tav("batch", write_list(tmp_path, f"{{video: {clip}}}"), "--checkpoint", "mini", "--output", "o", fails=True)
    assert told == (
        'error: batch needs Ray, which is an extra of the pack; run pip install "comfyui-tune-a-video[batch]"'
    )
    found = {path: re.findall(r"^( *)(?:import|from) ray\b", path.read_text(), re.MULTILINE)
             for path in (ROOT / "tav_core").rglob("*.py")}  # fmt: skip
    importing = {path.parent.name for path, indented in found.items() if indented}
    assert importing == {"batch"} and all(each for indented in found.values() for each in indented)  # in functions


# --------------------------------------------------------------------------------------------------- on Ray


def run_batch(monkeypatch, capfd, *args) -> tuple[int, str]:
    """The exit code of a command, and all that it says."""
    monkeypatch.setattr(sys, "argv", ["tav_core", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        cli.main()
        sys.exit(0)
    return end.value.code, "".join(capfd.readouterr())


def when(there, then):
    """Calls `then` in another thread as soon as `there` is true."""

    def wait():
        until = time.monotonic() + 400
        while not there():
            if time.monotonic() > until:
                return
            time.sleep(0.02)
        then()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def single_run(name: str, path: Path, checkpoint, folder: Path, **changes):
    """The weights of a job of a list that is run by itself."""
    (job,) = [job for job in read_jobs(path)[0] if job.entry.name == name]
    ((clip,), _) = jobs_of([job.entry], PRESETS["paper"], {}, folder)
    from tav_core.batch.jobs import job_of_spec
    from tav_core.evaluation import prepared

    clip, frames = job_of_spec(spec_of(clip, Frames(32, 32), {}), **changes)
    run_edit(*(lambda job, video: (job, checkpoint, video))(*prepared(clip, frames)), folder / name)
    return load_file(folder / name / "tuned.safetensors")


@pytest.mark.slow
def test_a_batch_survives_a_kill_a_bad_clip_too_little_memory_and_a_stop(clip, folder, tmp_path, monkeypatch, capfd):
    bad, out = tmp_path / "bad.mp4", tmp_path / "out"
    bad.write_bytes(clip.read_bytes()[:300])
    names = ["killed", "large", "three", "four", "five"]
    listed = [f"{{video: {clip}, name: {name}}}" for name in names[1:]]
    killed = f"{{video: {clip}, name: killed, settings: {{steps: 40, save_every: 1}}}}"
    path = write_list(tmp_path, killed, f"{{video: {bad}}}", *listed)
    checkpoint = load_checkpoint(folder)
    memory = {"large": "checkpointing"}
    alone = {name: single_run(name, path, checkpoint, tmp_path / "alone", memory=memory.get(name))
             for name in names[:3]}  # fmt: skip

    monkeypatch.setattr("tav_core.batch.command.Worker", made_short_of_memory(Worker))
    args = ("batch", path, "--checkpoint", folder, "--preset", "paper", "--size", 32, "--output", out)
    state, pid = out / "jobs" / "killed" / "tuning-state.safetensors", out / "killed.pid"
    pids = []

    def kill():
        pids.append(int(pid.read_text()))
        os.kill(pids[0], signal.SIGKILL)
        when(lambda: int(pid.read_text()) != pids[0] and state.exists(), lambda: os.kill(os.getpid(), signal.SIGINT))

    when(state.exists, kill)
    code, told = run_batch(monkeypatch, capfd, *args, "--workers", 2)
    assert code == 130 and "run the command again to go on" in told
    assert "killed: its worker died; it goes on from its state\n" in told
    code, more = run_batch(monkeypatch, capfd, *args, "--workers", 1)
    assert code == 2 and "has jobs that failed, 1 of 6; see above" in more
    assert "selective ran out of memory; it goes on with memory checkpointing" in told + more
    assert Counter(line for line in (told + more).splitlines() if line.endswith("is done")) == {
        f"{name} is done": 1 for name in names
    }
    for name in names:
        own, weights = load_file(out / "jobs" / name / "tuned.safetensors"), alone.get(name, alone["three"])
        assert all(torch.equal(own[key], weights[key]) for key in weights), name
    with open(out / "results.csv") as file:
        rows = {row["job"]: row for row in csv.DictReader(file)}
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(names, "done") | {"bad": "failed"}
    assert "has no video stream" in rows["bad"]["why"] and float(rows["five"]["psnr_rest"]) > 0
    page = (out / "index.html").read_text()
    assert all(f'src="jobs/{name}/strip.png"' in page for name in names) and "has no video stream" in page


@pytest.mark.slow
def test_stubs_in_great_number_are_neither_lost_nor_doubled(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    from tav_core.batch.cluster import cluster, hiring
    from tav_core.batch.pool import Job, Pool

    jobs = [Job({"name": f"job {n}", "dies": n in (20, 50)}) for n in range(300)]
    with cluster(None, 1, 0, 3, "test"):
        pool = Pool(jobs, hiring(Stub, {"output": str(tmp_path)}, 1, 0), 2, None, retries=1)
        lines = list(pool.events(lambda: False))
        hire = hiring(Stub, {"output": str(tmp_path), "base": "other weights"}, 1, 0)
        other = Pool(jobs[:1], lambda name: hire(f"other {name}"), 1, "these", 1)
        told = []  # a worker with another checkpoint gets no job
        with pytest.raises(TavError, match="workers are none that can work"):
            told.extend(filter(None, other.events(lambda: False)))
    done = Counter(line for path in tmp_path.glob("*.txt") for line in path.read_text().splitlines())
    assert done == {job.name: 1 for job in jobs if not job.spec["dies"]}
    assert sum("its worker died 2 times" in line for line in lines) == 2
    assert len(pool.finished) == 300 and len([line for line in lines if line]) == 302
    assert "worker 1 on" in told[0] and "has another checkpoint" in told[0] and not other.finished


# --------------------------------------------------------------------------------------------- two machines


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    """What starts a machine of a cluster on this one: its process, with those that it has started."""
    started = []
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    port = 20000 + os.getpid() % 20000
    ray = Path(sys.executable).parent / "ray"

    def start(*args) -> psutil.Process:
        command = [ray, "start", "--block", "--num-cpus=1", "--object-store-memory=80000000", *args]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   env=environment(RAY_DISABLE_IMPORT_WARNING="1"))  # fmt: skip
        started.append(psutil.Process(process.pid))
        for line in process.stdout:
            if "Ray runtime started" in line:
                break
        return started[-1]

    yield f"127.0.0.1:{port}", start, port
    for process in reversed(started):
        end(process)


def end(process: psutil.Process):
    """By force, with all that it has started."""
    for each in [*process.children(recursive=True), process]:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            pass


@pytest.mark.slow
def test_a_machine_that_leaves_takes_no_job_with_it(nodes, clip, folder, tmp_path, monkeypatch, capfd):
    address, start, port = nodes
    start("--head", f"--port={port}", "--include-dashboard=false")
    second = start(f"--address={address}")
    out = tmp_path / "out"
    jobs = [f"{{video: {clip}, name: {name}, settings: {{steps: 60, save_every: 1}}}}" for name in ("a", "b")]
    jobs.append(f"{{video: {clip}, name: c}}")
    monkeypatch.setattr("tav_core.batch.command.Worker", made_short_of_memory(Worker))
    left = []

    def there():
        """Both machines work, the second one in the middle of a tuning."""
        below = {process.pid for process in second.children(recursive=True)}
        for name in ("a", "b"):
            pid, state = out / f"{name}.pid", out / "jobs" / name / "tuning-state.safetensors"
            if pid.exists() and pid.read_text() and int(pid.read_text()) in below and state.exists():
                left.append(name)
        return left

    when(there, lambda: end(second))
    code, told = run_batch(monkeypatch, capfd, "batch", write_list(tmp_path, *jobs), "--checkpoint", folder, "--size",
                           32, "--output", out, "--address", address, "--gpus-per-job", 0, "--quiet")  # fmt: skip
    assert code == 0 and left, told
    results = {each["name"]: each for each in json.loads((out / "results.json").read_text())["jobs"]}
    assert {name: each["status"] for name, each in results.items()} == dict.fromkeys("abc", "done")
    assert results[left[0]]["tries"] == 2


@pytest.mark.slow
def test_an_evaluation_by_workers_writes_what_one_without_them_does(tmp_path, folder, tav, monkeypatch):
    dataset = make_tgve(tmp_path / "tgve")
    args = ("evaluate", "--dataset", dataset, "--checkpoint", folder, "--size", 32, "--steps", 1, "--sampling-steps", 1,
            "--kinds", "style", "--only", "stunt", "--quiet")  # fmt: skip
    tav(*args, "--output", tmp_path / "one")
    tav(*args, "--output", tmp_path / "many", "--batch", "--workers", 1)
    files = [{path.relative_to(each): path.read_bytes() for path in each.rglob("*.jpg")}
             for each in (tmp_path / "one" / "frames", tmp_path / "many" / "frames")]  # fmt: skip
    assert len(files[0]) == 2 and files[0] == files[1]
    assert (tmp_path / "many" / "summary.csv").read_text() == (tmp_path / "one" / "summary.csv").read_text()
    shutil.rmtree(tmp_path / "many")
