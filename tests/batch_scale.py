"""Measures how batches scale: real tiny jobs for soaking, and stub jobs of known length in great number.

    python tests/batch_scale.py soak [--jobs 100]       memory of driver and workers, over real tiny jobs
    python tests/batch_scale.py workers [--jobs 8]      real jobs a minute with 1 and with 2 workers, and what of a job
                                                        is not tuning, inversion or sampling
    python tests/batch_scale.py stubs [--jobs 10000] [--workers 2] [--seconds 0]
                                                        overhead a job, or efficiency with jobs of some seconds

Ray is started on this machine and stopped. The figures of BATCH.md come from here.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])  # of the workers
os.environ["OMP_NUM_THREADS"] = "1"


def megabytes(process: psutil.Process) -> int:
    return round(process.memory_info().rss / 1e6)


def tell(line: str):
    print(line, file=sys.stderr, flush=True)  # stdout is silent beside a batch


def workers_of() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if re.match("ray::(job |Worker)", " ".join(process.cmdline())):
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def specs(count: int, folder: Path, steps: int, frames: int = 2, size: int = 32):
    """Jobs of the mini checkpoint's world."""
    import torch

    from tav_core.batch.jobs import facts_of, spec_of
    from tav_core.checkpoint import load_checkpoint
    from tav_core.dataset import Entry
    from tav_core.evaluation import ClipJob, Frames, job_of
    from tav_core.mini import world
    from tav_core.presets import PRESETS, with_settings
    from tav_core.sampling import Edit
    from tav_core.video import save_video

    facts = facts_of(load_checkpoint("mini"))
    drawn = world.render_clip(world.clip_scenes(world.Scene(), "slide", frames), size)
    save_video(torch.from_numpy(drawn), folder / "ball.mp4", 8)
    preset = with_settings(PRESETS["mini"], steps=steps, sampling_steps=max(2, steps // 8))
    for number in range(count):
        edits = {"object": Edit("a red star is sliding on the grass")}
        entry = Entry(f"job {number}", folder / "ball.mp4", "a red ball is sliding on the grass", edits, count=frames)
        yield spec_of(ClipJob(entry, job_of(entry, preset, {})), Frames(size, size), facts)


def run(jobs, worker, settings, workers: int, each=lambda pool: None) -> tuple[object, float]:
    """Has jobs done; the pool, and the seconds from the first worker that is ready to the end."""
    from tav_core.batch.cluster import check_ray, cluster, hiring
    from tav_core.batch.pool import Pool

    check_ray(None)
    with cluster(None, 1, 0, workers, "scale"):
        pool, began = Pool(jobs, hiring(worker, settings, 1, 0), workers, None, 3), None
        for _ in pool.events(lambda: False):
            if began is None and sum(hand.state == "working" for hand in pool.hands) == len(pool.hands):
                began = time.monotonic()
                pool.already = len(pool.finished)
            each(pool)
        return pool, time.monotonic() - began


def settings_in(folder: Path, **changes) -> dict:
    (folder / "batch.json").write_text(json.dumps({"batch": "scale"}))
    return {"output": str(folder), "batch": "scale", "layout": "project", "device": "cpu", "checkpoint": "mini",
            "threads": 1, "prediction_type": None, "added": {"lora": [], "embedding": []}, "prompt_weights": False,
            "clip": None, "pickscore": None, "dino": None, "lpips": None, "raft": None} | changes  # fmt: skip


def soak(args):
    from tav_core.batch.pool import Job
    from tav_core.batch.worker import Worker

    with tempfile.TemporaryDirectory() as temporary:
        folder, told = Path(temporary), {}

        def each(pool):
            at = len(pool.finished)
            if at and at % 10 == 0 and at not in told:
                told[at] = megabytes(psutil.Process()), sorted(map(megabytes, workers_of()))
                tell(f"{at} jobs: driver {told[at][0]} MB, workers {told[at][1]} MB")

        jobs = [Job(spec) for spec in specs(args.jobs, folder, steps=2)]
        pool, seconds = run(jobs, Worker, settings_in(folder), args.workers, each)
        assert [job.result["status"] for job in pool.finished] == ["done"] * args.jobs, pool.finished
        assert Counter(job.name for job in pool.finished) == {job.name: 1 for job in jobs}
        assert all("result" in json.loads(path.read_text()) for path in folder.glob("jobs/*/job.json"))
        tell(f"{args.jobs} jobs in {seconds:.0f} s")


def workers(args):
    from tav_core.batch.pool import Job
    from tav_core.batch.worker import Worker

    for count in (1, 2):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            jobs = [Job(spec) for spec in specs(args.jobs, folder, steps=args.steps, frames=8, size=64)]
            pool, seconds = run(jobs, Worker, settings_in(folder), count)
            took = sum(job.result["took"] for job in pool.finished)
            stages = Counter()
            for job in pool.finished:
                stages.update(job.result["seconds"])
            at_work = sum(stages[name] for name in ("tune", "invert", "sample", "find the subject"))
            tell(f"{count} workers: {(len(jobs) - pool.already) / seconds * 60:.1f} jobs a minute; a job takes "
                 f"{took / len(jobs):.2f} s, of which {1 - at_work / took:.1%} are not tuning, inversion or sampling; "
                  f"the workers worked {took / seconds / count:.1%} of the time")  # fmt: skip


def stubs(args):
    from support.batch_workers import Stub
    from tav_core.batch.pool import Job

    with tempfile.TemporaryDirectory() as temporary:
        folder, before = Path(temporary), megabytes(psutil.Process())
        jobs = [Job({"name": f"job {n}", "seconds": args.seconds}) for n in range(args.jobs)]
        cpu = psutil.Process().cpu_times()
        pool, seconds = run(jobs, Stub, settings_in(folder), args.workers)
        used = psutil.Process().cpu_times()
        done = Counter(line for path in folder.glob("*.txt") for line in path.read_text().splitlines())
        assert done == {job.name: 1 for job in jobs}
        spent = (used.user - cpu.user) / args.jobs * 1000
        tell(f"{args.jobs} jobs of {args.seconds:g} s by {args.workers} workers: {seconds:.1f} s, driver "
             f"{before} -> {megabytes(psutil.Process())} MB, {spent:.2f} ms of its processor a job")  # fmt: skip
        times = {}
        for job in pool.finished:
            times.setdefault(job.result["pid"], []).append((job.result["began"], job.result["ended"]))
        gaps = [after[0] - before[1] for own in times.values() for before, after in zip(sorted(own), sorted(own)[1:])]
        busy = sum(ended - began for own in times.values() for began, ended in own)
        mean, most = sum(gaps) / len(gaps) * 1000, max(gaps) * 1000
        tell(f"between two jobs of a worker: {mean:.1f} ms on average, {most:.0f} ms at most; efficiency "
             f"{busy / (busy + sum(gaps)):.2%}; {seconds * 1000 / args.jobs:.2f} ms a job")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("soak", "workers", "stubs"))
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    args.jobs = args.jobs or {"soak": 100, "workers": 8, "stubs": 10_000}[args.what]
    {"soak": soak, "workers": workers, "stubs": stubs}[args.what](args)


if __name__ == "__main__":
    main()
