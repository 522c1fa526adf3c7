"""The command `batch`, and `evaluate --batch`."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import evaluation, given, job, pipeline
from ..arguments import FRAMES
from ..checkpoint import Checkpoint
from ..dataset import in_words
from ..errors import Cancelled, TavError
from ..evaluation import ClipJob, Frames, read_json
from ..limits import check_pixels
from ..measure import MODELS, Models
from ..memory import release
from ..project import write_json
from ..terminal import Progress, check_faults, tell
from ..where import MINI
from .cluster import check_ray, cluster, hiring, whole
from .jobs import JOBS, Listed, comparable, expanded, facts_of, read_jobs, read_sweep, spec_of
from .pool import Job, Pool
from .report import REPORT, SWEEP, as_lines, compared, write_results
from .table import Table
from .worker import JOB, STARTED, Worker

RETRIES = 3  # where nothing else says how many


def batch(args):
    """Does the jobs of a list, and measures them."""
    check_ray(args.address)
    _settle(args)
    listed, faults = read_jobs(args.jobs)
    preset = given.preset(args)
    sweep = read_sweep(args.sweep or (), preset)
    wanted = list(expanded([_with_options(each, args) for each in listed], sweep))
    clips, more = evaluation.jobs_of([each.entry for each in wanted], preset, given.inflation(args), args.output)
    check_faults(JOBS, args.jobs, [*faults, *more])
    job.check_folder(args.output, [*REPORT, SWEEP, STARTED], **{JOBS: args.jobs})
    args.device = torch.device("cpu")  # from here on this process only looks; the devices are the workers'
    models = given.models(args)  # whether they can be read
    checkpoint = given.checkpoint(args, preset)
    if args.size is not None:
        pipeline.check_size(checkpoint, width=args.size[0], height=args.size[1])
    frames = [_frames(each, args, checkpoint) for each in wanted]
    faults = [*evaluation.word_faults(clips, checkpoint), *_size_faults(clips, frames, checkpoint, models)]
    check_faults(JOBS, args.jobs, faults)
    facts = facts_of(checkpoint)
    del checkpoint
    specs = [spec_of(clip, own, facts) for clip, own in zip(clips, frames)]
    with job.claimed(args.output):
        known = {spec["name"] for spec in specs if _result(args.output, spec)}
        missing = [Job(spec) for spec in specs if spec["name"] not in known]
        try:
            work(args, missing, len(known), "project", facts["base"])
        finally:  # also of what was stopped
            told = _told(args.output, specs, {each.name: each for each in missing})
            write_results(told, sweep, args.output)
    _report(args, told, sweep)


def edit_all(args, clips: Sequence[ClipJob], checkpoint: Checkpoint, frames: Frames) -> dict[str, str]:
    """`evaluation.edit_all` by workers: why, by the names of the clips that failed."""
    for part in (checkpoint.vae, checkpoint.text_encoder):  # the device is the workers' for now
        torch.nn.Module.to(part, "cpu")
    release(args.device)
    facts = facts_of(checkpoint)
    missing = [Job(spec_of(clip, frames, facts)) for clip in clips if not evaluation.is_done(clip, args.output)]
    work(args, missing, len(clips) - len(missing), "evaluation", facts["base"])
    return {each.name: each.result["why"] for each in missing if each.result["status"] == "failed"}


def _settle(args):
    """What a worker has where nothing is said: a GPU if there may be one, and a single thread of the CPU."""
    if args.address is not None and not args.address.strip():
        raise TavError("address", args.address, "is none", "give host:port, or auto")
    args.cpus_per_job = args.cpus_per_job or 1
    args.retries = RETRIES if args.retries is None else args.retries
    if args.gpus_per_job is None:
        args.gpus_per_job = 1.0 if args.address is not None or torch.cuda.is_available() else 0.0
    if args.gpus_per_job and args.device.type == "cpu":  # the driver of a cluster
        args.dtype = args.dtype or "bf16"
    args.worker_device = "cuda" if args.gpus_per_job else "cpu" if args.device.type == "cuda" else str(args.device)


def settle_for_evaluation(args):
    """`batch`'s own options, for `evaluate`."""
    check_ray(args.address)
    _settle(args)


def _with_options(each: Listed, args) -> Listed:
    entry = each.entry
    count, stride = entry.count or args.frames or FRAMES, entry.stride or args.stride
    return replace(each, entry=replace(entry, count=count, stride=stride))


def _frames(each: Listed, args, checkpoint: Checkpoint) -> Frames:
    width, height = each.size or args.size or (checkpoint.size, checkpoint.size)
    return Frames(width, height, each.fit or args.fit)


def _size_faults(
    clips: Sequence[ClipJob], frames: Sequence[Frames], checkpoint: Checkpoint, models: Models
) -> list[str]:
    faults = []
    for clip, own in zip(clips, frames):
        try:
            pipeline.check_size(checkpoint, width=own.width, height=own.height)
            check_pixels(clip.entry.count, own.width, own.height)
            models.check_frames(own.width, own.height)
        except TavError as error:
            faults.append(f"{clip.name}: {in_words(error)}")
    return faults


def work(args, missing: Sequence[Job], known: int, layout: str, base: str):
    """Has jobs done by workers on Ray; each then has its result, but for those that were stopped.

    Args:
        known: how many of the batch were done before.
        layout: "project" or "evaluation".
        base: fingerprint of the checkpoint.

    Raises:
        Cancelled: by Ctrl-C or SIGTERM.
        TavError: no Ray, or no worker.
    """
    if not missing:
        return
    batch = secrets.token_hex(8)
    write_json(args.output / STARTED, {"batch": batch, "began": time.strftime("%Y-%m-%d %H:%M:%S")})
    settings = {"output": whole(args.output), "batch": batch, "layout": layout, "device": args.worker_device,
                "checkpoint": "mini" if args.found == MINI else whole(args.found), "threads": args.cpus_per_job,
                "prediction_type": args.prediction_type, "prompt_weights": args.prompt_weights,
                "added": {"lora": [(whole(path), strength) for path, strength in args.added["lora"]],
                          "embedding": [whole(path) for path in args.added["embedding"]]},
                **{name: whole(getattr(args, name)) for name in MODELS}}  # fmt: skip
    resources = args.cpus_per_job, args.gpus_per_job
    with cluster(args.address, *resources, args.workers, f"tune-a-video {args.output.name} {batch[:4]}") as workers:
        pool = Pool(missing, hiring(Worker, settings, *resources), workers, base, args.retries)
        stop = Progress(args.quiet).stop_at_interrupt()  # behind Ray, which has a handler of its own
        with Table(known, known + len(missing), args.quiet) as table:
            try:
                for line in pool.events(lambda: stop.stopped):
                    if line:
                        table.tell(line)
                    table.draw(pool)
            except Cancelled as stopped:
                raise Cancelled(f"{stopped}; run the command again to go on") from None


def _result(output: Path, spec: dict[str, Any]) -> dict[str, Any] | None:
    """What a job gave, if it is done as it is wanted now, and nobody took its files away."""
    folder = output / "jobs" / spec["name"]
    before = read_json(folder / JOB)
    if not before or before.get("job") != comparable(spec) or "result" not in before:
        return None
    there = all((folder / edit["file"]).is_file() for edit in before["result"]["edits"])
    return before if there else None


def _told(output: Path, specs: Sequence[dict[str, Any]], now: dict[str, Job]) -> list[dict[str, Any]]:
    """All jobs of the batch, in their order, each with its status."""
    told = []
    for spec in specs:
        name, found = spec["name"], _result(output, spec)
        each = {"name": name, "status": "done" if found else "missing", "tries": 1}
        if name in now:
            own, result = now[name], now[name].result or {}
            each |= {"tries": own.deaths + 1 + (own.memory is not None and not own.deaths)}
            if result.get("status") == "failed":
                each |= {"status": "failed", "why": result["why"]}
        told.append(each | ({"result": found["result"], "memory": found["memory"]} if each["status"] == "done" else {}))
    return told


def _report(args, told: Sequence[dict[str, Any]], sweep: dict[str, list[Any]]):
    for line in as_lines(compared(told, sweep)):
        tell(line)
    failed = [each for each in told if each["status"] == "failed"]
    for each in failed:
        tell(f"{each['name']} failed: {each['why']}")
    tell(f"{args.output}: " + ", ".join([*REPORT, *([SWEEP] if sweep else [])]))
    if failed:
        remedy = "see above, put it right, and run the command again, which does only what is missing"
        raise TavError(JOBS, args.jobs, f"has jobs that failed, {len(failed)} of {len(told)}", remedy)
