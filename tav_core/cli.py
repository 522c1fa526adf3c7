"""The command line: edit a video with one sentence (Tune-A-Video, arXiv 2212.11565)."""

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import bench, evaluation, given, job, pipeline
from .arguments import (
    EXAMPLES,
    FRAMES,
    batch_arguments,
    demo_arguments,
    device_argument,
    doctor_arguments,
    edit_arguments,
    evaluate_arguments,
    export_arguments,
    invert_arguments,
    metrics_arguments,
    sample_arguments,
    tune_arguments,
)
from .atomic import check_new_folder
from .checkpoint import Checkpoint
from .dataset import chosen, read_dataset
from .doctor import about_machine, examine, versions
from .drawing import draw
from .errors import Cancelled, TavError, field
from .events import Plan, Stage
from .export import save_pipeline
from .lora import with_loras
from .measure import MODELS, REPORT, Measured, Models, as_table, mask_of, measure, measure_job, write_report
from .noise import InvertedNoise, read_noise, save_noise
from .project import SHOWN, SUMMARY, Project, file_name, write_json
from .record import FAIR, GOOD, command_of, explained, record_of
from .sampling import Edit
from .sentences import check_sentence
from .steps import STEP_STRIP, file_of_step
from .subject import subject_steps
from .terminal import Parser, Progress, check_faults, check_needs, preset_of, run, tell
from .tuned_weights import TunedInfo
from .tuning_state import hash_tensors
from .video import load_video
from .where import SD15, known_checkpoints
from .windows import check_context_length

SUBJECT = ("contrast", "word", "mask")  # what tells where it is


@contextmanager
def _told_how_to_go_on(how: str = "add --resume") -> Iterator[None]:
    try:
        yield
    except Cancelled as stop:
        raise Cancelled(f"{stop}; {how} to go on") from None


def _edit(args):
    check_needs(args, context_overlap="context_length", softness=SUBJECT, steady=SUBJECT)
    given.check_subject(args)
    if args.seed is not None and len(args.seed) > 1:
        problem = "has several values, and is that of the tuning: a project is tuned once"
        remedy = f"give one for each {field('output')}, or {field('edit_seed')} with {field('eta')}"
        raise TavError("seed", None, problem, remedy)
    edits, preset = given.edits(args, args.edit_seed), given.preset(args)
    if args.edit_seed is not None and preset.eta == 0:
        raise TavError("edit_seed", None, f"does nothing without {field('eta')}", "give that, or leave it out")
    found_by = dict(word=args.word or "", mask=None if args.mask is None else torch.ones(1, 1, 1))  # till it is read
    settings = (given.softness(args), args.negative_prompt, given.inflation(args))
    wanted = job.EditJob(args.prompt, edits, preset, args.contrast or (), *settings, **found_by,
                         rank=args.rank, loras=given.loras(args, "edit_lora"))  # fmt: skip
    given.check_sentences(args, args.prompt, *args.edit, args.negative_prompt, *args.contrast or ())
    if args.overwrite and args.resume:
        raise TavError("resume", None, f"has nothing to go on with after {field('overwrite')}", "leave one of them out")
    _check_project(args, wanted, args.resume, video=args.video, mask=args.mask, hints=args.hints)
    nets, checkpoint = given.control_models(args), given.checkpoint(args, preset)
    clip = given.clip(args, checkpoint, args.video, sound=args.audio)
    shape = clip.frames.shape[:3]
    control = given.control(args, nets, checkpoint, *shape, start=args.start, stride=args.stride, count=shape[0])
    wanted = replace(wanted, mask=given.mask(args, clip), control=control)
    wanted.check_fits(checkpoint, *shape)
    if args.dry_run:
        done = set() if args.overwrite else job.done_in(args.output, wanted, checkpoint, clip)
        count, height, width, _ = clip.frames.shape
        _examine(args, checkpoint, wanted, count, width, height, done)
        return
    with job.claimed(args.output), _told_how_to_go_on():
        progress = Progress(args.quiet).stop_at_interrupt()
        summary, _ = job.run_edit(wanted, checkpoint, clip, args.output, resume=args.resume, overwrite=args.overwrite,
                                  callback=progress)  # fmt: skip
        run = record_of(args, sys.argv, preset, checkpoint, clip)
        summary |= {**explained(summary), "run": run}
        Project(args.output, summary).made_by(run["command"])
    _report(args.output, summary)


def _check_project(args, wanted: job.EditJob, resume: bool, **inputs: Path | list[Path] | None):
    """Says before any work what is in the way of a project in --output."""
    first = 1 if args.overwrite else Project.at(args.output).next_number
    job.check_folder(args.output, wanted.files(first), **inputs)
    if not args.overwrite:
        job.check_free(args.output, resume)


def _doctor(args):
    for line in about_machine(args.device):
        tell(line)
    if args.checkpoint is None:
        here = list(known_checkpoints(args.comfyui))
        tell("checkpoints by name: " + (", ".join(here[:8]) or f"none; give one, or {SD15}"))
        return
    preset = given.preset(args)
    checkpoint = given.checkpoint(args, preset)
    width, height = given.size(args, checkpoint)
    if args.context_length is not None:
        check_context_length(args.context_length, args.frames)
    _examine(args, checkpoint, job.EditJob("a clip", [Edit("an edit")], preset), args.frames, width, height)


def _examine(
    args, checkpoint: Checkpoint, wanted: job.EditJob, frames: int, width: int, height: int, done: Collection[str] = ()
):
    for line in examine(checkpoint, wanted, frames, width, height, Progress(args.quiet), done):
        tell(line)


def _demo(args):
    from .mini import demo  # the world is needed here alone

    check_needs(args, context_overlap="context_length")
    edits = [Edit(prompt, demo.REGIONS[kind]) for kind, prompt in demo.EDITS.items()]
    wanted = job.EditJob(demo.PROMPT, edits, given.preset(args), demo.CONTRASTS)
    if args.context_length is not None:
        check_context_length(args.context_length, FRAMES)
    _check_project(args, wanted, resume=True)
    checkpoint = given.checkpoint(args, wanted.preset)
    clip = load_video(demo.CLIP, count=FRAMES, width=checkpoint.size, height=checkpoint.size)
    with job.claimed(args.output):
        with _told_how_to_go_on("run the command again"):
            progress = Progress(args.quiet).stop_at_interrupt()
            summary, videos = job.run_edit(wanted, checkpoint, clip, args.output, overwrite=args.overwrite,
                                           callback=progress)  # fmt: skip
        summary |= explained(summary)
        summary["judged"] = {kind: demo.score(kind, video.numpy()) for kind, video in zip(demo.EDITS, videos)}
        write_json(args.output / SUMMARY, summary)
    _report(args.output, summary)
    print("judged by the classifier that ships with the mini checkpoint (1 is best):")
    for kind, figures in summary["judged"].items():
        print(f"  {kind:<10} " + "  ".join(f"{name} {value:.2f}" for name, value in figures.items()))


def _report(output: Path, summary: dict[str, Any]):
    loss, seconds = summary["probe_loss"], summary["seconds"]
    print(f"probe loss {loss['before']:.4f} -> {loss['after']:.4f}: error of the predicted noise, before and after the "
          "tuning; it says that the clip was learned, not that edits are good")  # fmt: skip
    reached, walk, ceiling = (summary[f"{name}_psnr"] for name in ("reconstruction", "walk", "vae"))
    quality, limits = summary["reconstruction_quality"], f"good from {GOOD[0]} dB on, fair from {FAIR[0]}"
    print(f"reconstruction {reached} dB: {quality} ({limits}; without guidance {walk} dB, the VAE alone {ceiling} dB)")
    print(", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items()))
    files = [each["file"] for each in (summary["reconstruction"], *summary["edits"])]
    strips = [STEP_STRIP] if (output / STEP_STRIP).exists() else []
    tell(f"{output}: {', '.join([*SHOWN, *strips, *files])}")


def _tune(args):
    videos, prompts = len(args.video), len(args.prompt)
    if videos != prompts:
        remedy = f"give each {field('video')} its own {field('prompt')}, in the same order"
        raise TavError("video", None, f"has {videos} values, {field('prompt')} {prompts}", remedy)
    for prompt in args.prompt:
        pipeline.check_prompt(prompt)
    preset = given.preset(args)
    given.check_sentences(args, *args.prompt)
    for video in args.video:
        job.check_folder(args.output, job.tuned_files(preset), video=video)
    job.check_unfinished(args.output, args.resume)
    if (args.output / SUMMARY).exists():
        raise TavError("output", args.output, "holds a project, which has its tuned weights", "choose another one")
    checkpoint = given.checkpoint(args, preset)
    clips = [given.clip(args, checkpoint, video) for video in args.video]
    sources = [pipeline.prepare(checkpoint, clip.frames, prompt) for clip, prompt in zip(clips, args.prompt)]
    with job.claimed(args.output), _told_how_to_go_on():
        progress = Progress(args.quiet).stop_at_interrupt()
        progress(Plan((Stage("tune", preset.tuning.steps),)))
        _, result = job.tune_into(args.output, checkpoint, sources, preset, inflation=given.inflation(args),
                                  rank=args.rank, resume=args.resume, callback=progress)  # fmt: skip
        (args.output / job.STATE).unlink(missing_ok=True)
    print(f"probe loss {result.probe_losses[0][1]:.4f} -> {result.probe_losses[-1][1]:.4f}")
    tell(args.output / "tuned.safetensors", *map(file_of_step, result.kept))


def _invert(args):
    check_needs(args, softness=SUBJECT, seed="contrast")
    given.check_subject(args)
    job.check_file(args.output, (".safetensors",), video=args.video, tuned=args.tuned, mask=args.mask)
    preset, prompt = given.preset(args), given.prompt(args, given.tuned_info(args))
    if prompt:
        pipeline.check_contrasts(prompt, args.contrast or ())
    checkpoint = given.checkpoint(args, preset)
    unet, info, weights = given.tuned_unet(args, checkpoint)
    args.frames, args.size = args.frames or info.num_frames or FRAMES, args.size or (info.width, info.height)
    given.window_if_longer(args, info, args.frames)
    preset, subject = preset_of(args), None
    if args.word:
        pipeline.places_of(checkpoint, prompt, args.word, preset)
    clip = given.clip(args, checkpoint, args.video, sound=args.audio)
    mask, source = given.mask(args, clip), pipeline.prepare(checkpoint, clip.frames, prompt)
    progress = Progress(args.quiet).stop_at_interrupt()
    steps = subject_steps(len(args.contrast or ()), bool(args.word))
    found = [Stage("subject", steps)] * (steps > 0 and mask is None)
    progress(Plan((Stage("invert", preset.sampling_steps), *found)))
    noise = pipeline.invert(checkpoint, unet, source, preset, callback=progress)
    if mask is not None:
        subject = pipeline.drawn_subject(mask, clip.frames, given.softness(args))
    elif args.contrast or args.word:
        told = (args.contrast or (), preset, given.softness(args), args.word or "")
        subject = pipeline.find_subject(checkpoint, unet, source, *told, callback=progress)
    inverted = InvertedNoise(noise, prompt, subject, clip.frames, clip.fps, clip.sound, weights,
                             contrasts=tuple(args.contrast or ()))  # fmt: skip
    save_noise(args.output, inverted, preset)
    tell(args.output)


def _sample(args):
    if args.noise is None:
        check_needs(args, **dict.fromkeys(("attention_injection", "caption_as_negative", "steady", "edits_at_once"),
                                          "noise"))  # fmt: skip
    preset = given.preset(args)
    of_seed = None if preset.eta > 0 else args.seed and " ".join(map(str, args.seed))
    for name, value, or_with in (("frames", args.frames, ""), ("seed", of_seed, f", or of {field('eta')}")):
        if args.noise is not None and value is not None:
            problem = f"does nothing with {field('noise')}: it is of random noise{or_with}"
            raise TavError(name, value, problem, "leave it out")
    edits, loras = given.edits(args, None if args.noise is None else args.seed), given.loras(args, "edit_lora")
    given.tuned_info(args)  # a damaged file should not surface after the checkpoint is loaded
    inverted = None if args.noise is None else read_noise(args.noise, preset)
    of_clip, subject = ([], None) if inverted is None else ([inverted.prompt], inverted.subject)
    given.check_sentences(args, *args.edit, args.negative_prompt, *of_clip)
    if args.steady is not None and subject is None:
        problem = f"does nothing: {args.noise} knows no subject"
        raise TavError("steady", args.steady, problem, f"leave it out, or invert with {field('contrast')}")
    for edit in edits:
        pipeline.check_edit(edit.prompt, edit.region, subject is not None)
    files = [
        f"{file_name(number, edit.prompt)}.mp4"
        for number, edit in enumerate(edits, Project.at(args.output).next_number)
    ]
    job.check_folder(args.output, [*files, *SHOWN, SUMMARY], noise=args.noise, tuned=args.tuned,
                     hints=args.hints)  # fmt: skip
    nets, checkpoint = given.control_models(args), given.checkpoint(args, preset)
    unet, info, weights = given.tuned_unet(args, checkpoint)
    rate, sound = given.pace(args, inverted)
    if inverted is None:
        starts = {seed: InvertedNoise(given.random_noise(args, checkpoint, info, seed), "", fps=rate)
                  for seed in args.seed or [preset.tuning.seed]}  # fmt: skip
    else:
        given.check_noise(args.noise, inverted, checkpoint, weights)
        starts = {None: replace(inverted, fps=rate, sound=sound)}
    given.window_if_longer(args, info, next(iter(starts.values())).latents.shape[2])
    count, *sides = next(iter(starts.values())).latents.shape[2:]
    for name, text in [*(("edit", edit.prompt) for edit in edits), ("negative_prompt", args.negative_prompt)]:
        check_sentence(text, count, name, checkpoint.prompt_weights)
    control = given.control(args, nets, checkpoint, count, *(checkpoint.downscale * side for side in sides))
    preset, drawn = preset_of(args), []
    styled = with_loras(checkpoint, unet, loras)
    with job.claimed(args.output):
        project = _shared(args, info, checkpoint, weights, next(iter(starts.values())))
        progress = Progress(args.quiet).stop_at_interrupt()
        progress(Plan((Stage("sample", len(files) * len(starts) * preset.sampling_steps),)))
        if inverted is not None and inverted.frames is not None and "source" not in project.summary:
            project.put("source", inverted.frames, rate, sound)
        for seed, start in starts.items():
            drawn += draw(project, edits, *styled, preset, start, negative_prompt=args.negative_prompt,
                          seed=seed, control=control, callback=progress)  # fmt: skip
        project.show_grid(drawn, rate)
        project.show(rate, sound)
        project.made_by(command_of(args, sys.argv))
    for edit in drawn:
        tell(args.output / edit["file"])


def _shared(args, info: TunedInfo, checkpoint: Checkpoint, weights: str, start: InvertedNoise) -> Project:
    """The project in --output, which knows what its edits share.

    Raises:
        TavError: it has other weights, another clip or another size.
    """
    project, remedy = Project.at(args.output), f"choose another {field('output')}"
    (_, _, count, height, width), factor = start.latents.shape, checkpoint.downscale
    facts = {"prompt": start.prompt or info.prompt, "checkpoint": checkpoint.name, "frames": count,
             "fps": round(start.fps, 3), "size": [width * factor, height * factor], "weights": weights}  # fmt: skip
    if start.frames is not None:
        facts["clip"] = hash_tensors([start.frames])
    for of, shown, name in (("tuned", args.tuned, "weights"), ("noise", args.noise, "clip"),
                            ("size", facts["size"], "size")):  # fmt: skip
        if name in facts:
            project.check_same(of, shown, project.summary, name, facts[name], remedy)
    project.summary = facts | project.summary
    return project


def _metrics(args):
    folders = [path for path in args.edited if (path / "summary.json").is_file()]
    if folders and (len(args.edited) > 1 or args.source or args.prompt or args.mask or args.source_prompt):
        problem = "is the folder of an edit, which knows its source, its sentences and its masks"
        raise TavError("edited", folders[0], problem, "give it alone, or videos")
    if not folders:
        _check_measured(args)
    output = args.output or (folders[0] if folders else Path("."))
    job.check_folder(output, REPORT, mask=args.mask, source=args.source)
    models = given.models(args).to(args.device)
    with job.claimed(output):
        rows, videos, source = measure_job(folders[0], models) if folders else _measured(args, models)
        for line in as_table(rows).splitlines():
            tell(line)
        write_report(rows, videos, source, output)
    tell(f"{output}: " + ", ".join(REPORT))


def _measured(args, models: Models) -> tuple[list[Measured], list[torch.Tensor], torch.Tensor]:
    """The figures of single videos, the videos, and their source."""
    videos = [load_video(path, sound=False, callback=Progress()).frames for path in args.edited]
    count, height, width = videos[0].shape[:3]
    source = load_video(args.source, count=count, width=width, height=height, sound=False).frames
    mask = args.mask and mask_of(load_video(args.mask, width=width, height=height, sound=False).frames, count)
    rows = [measure(path.name, video, source, prompt, args.source_prompt, mask, models)
            for path, video, prompt in zip(args.edited, videos, args.prompt)]  # fmt: skip
    return rows, videos, source


def _check_measured(args):
    if args.source is None:
        raise TavError("source", None, "is missing", "give the video that was edited, in the frames of the edit")
    if len(args.prompt or ()) != len(args.edited):
        problem = f"has {len(args.prompt or ())} values for {len(args.edited)} {field('edited')}"
        raise TavError("prompt", None, problem, "give each video the sentence that it should show, in the same order")
    for prompt in args.prompt:
        pipeline.check_prompt(prompt)
    if args.source_prompt is not None and args.clip is None:
        raise TavError("source_prompt", args.source_prompt, f"does nothing without {field('clip')}", "leave it out")


def _evaluate(args):
    check_needs(args, **dict.fromkeys(("address", "gpus_per_job", "cpus_per_job", "workers", "retries"), "batch"))
    if args.batch:
        from .batch.command import edit_all, settle_for_evaluation

        settle_for_evaluation(args)
    preset, inflation, found = given.preset(args), given.inflation(args), read_dataset(args.dataset, FRAMES)
    wanted = found.entries if found.faults else chosen(found.entries, args.only, args.kinds)
    entries = [replace(entry, count=entry.count or args.frames or found.count, stride=entry.stride or args.stride)
               for entry in wanted]  # fmt: skip
    jobs, faults = evaluation.jobs_of(entries, preset, inflation, args.output)
    check_faults("dataset", args.dataset, [*found.faults, *faults])
    job.check_folder(args.output, [*evaluation.REPORT, evaluation.SETTINGS], dataset=args.dataset)
    models, checkpoint = given.models(args), given.checkpoint(args, preset)
    side = min(found.size or checkpoint.size, checkpoint.size)
    frames = evaluation.Frames(*(args.size or (side, side)), args.fit)
    pipeline.check_size(checkpoint, width=frames.width, height=frames.height)
    models.check_frames(frames.width, frames.height)
    check_faults("dataset", args.dataset, evaluation.word_faults(jobs, checkpoint))
    with job.claimed(args.output), _told_how_to_go_on("run the command again"):
        evaluation.check_settings(args.output, preset, inflation, checkpoint, frames)
        progress = Progress(args.quiet).stop_at_interrupt()
        if args.batch:
            failed = edit_all(args, jobs, checkpoint, frames)
        else:
            failed = evaluation.edit_all(jobs, checkpoint, args.output, frames, progress)
        names = {name: str(getattr(args, name)) for name in MODELS}
        rows, more = evaluation.measure_all(jobs, args.output, models.to(args.device), names, progress)
        evaluation.write_evaluation(rows, failed | more, args.output)
    for line in as_table(evaluation.summed_up(rows)).splitlines():
        tell(line)
    for name, why in (failed | more).items():
        tell(f"{name} failed: {why}")
    tell(f"{args.output}: " + ", ".join(evaluation.REPORT))
    if failed or more:
        remedy = "see above, put it right, and run the command again, which does only what is missing"
        raise TavError("dataset", args.dataset, f"has clips that failed, {len(failed | more)} of {len(jobs)}", remedy)


def _export(args):
    job.check_folder(args.output, ["model_index.json"], tuned=args.tuned)
    check_new_folder(args.output)
    preset = given.preset(args)
    given.tuned_info(args)  # a damaged file should not surface after the checkpoint is loaded
    checkpoint = given.checkpoint(args, preset)
    unet, _, _ = given.tuned_unet(args, checkpoint)
    save_pipeline(checkpoint, unet, args.output)
    tell(f"{args.output}: " + ", ".join(sorted(path.name for path in args.output.iterdir())))


def _batch(args):
    from .batch.command import batch  # Ray is an extra that this command alone needs

    batch(args)


def _bench_arguments(parser):
    device_argument(parser)
    bench.add_arguments(parser)


COMMANDS = {
    "demo": (_demo, demo_arguments, "tune, invert and edit the clip that ships with the pack, on its small "
                                    "checkpoint"),
    "edit": (_edit, edit_arguments, "tune on a clip, invert it, and sample edited versions of it"),
    "tune": (_tune, tune_arguments, "tune on a clip, or on several, and write DIR/tuned.safetensors"),
    "invert": (_invert, invert_arguments, "invert a clip with tuned weights to the noise it would come from"),
    "sample": (_sample, sample_arguments, "sample edited clips from inverted (or random) noise"),
    "doctor": (_doctor, doctor_arguments, "tell what this machine can do: what fits into its memory, and how long it "
                                          "takes, by two real steps of each stage"),
    "evaluate": (_evaluate, evaluate_arguments, "edit and measure all clips of LOVEU-TGVE 2023, or of a list of yours"),
    "metrics": (_metrics, metrics_arguments, "measure edits beside their source: fidelity, motion, and by CLIP"),
    "bench": (bench.bench, _bench_arguments, "measure the speed and the memory of every stage, against the method "
                                             "written plainly"),
    "export": (_export, export_arguments, "write a checkpoint with its tuned weights as one folder, as published "
                                          "Tune-A-Video models are"),
    "batch": (_batch, batch_arguments, "edit and measure the clips of a list on many GPUs or machines, by Ray"),
}  # fmt: skip


def main(prog: str = "tune-a-video"):
    parser = Parser(prog=prog, description=__doc__.split(": ", 1)[1])
    parser.add_argument(
        "--version", action="version", version=", ".join(f"{name} {version}" for name, version in versions().items())
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (function, add_arguments, help) in COMMANDS.items():
        example = f"example: tune-a-video {name} {EXAMPLES[name]}"
        sub = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", epilog=example)
        add_arguments(sub)
        sub.set_defaults(run=function, parser=sub)
    run(parser)
