"""Feeds every option of every command what people and their scripts feed it, and counts what is handled badly.

    python tests/fuzz_cli.py [--seed 0] [--random 300] [--only TEXT] [--pack DIR] [--verbose]

Each input runs in a child that is forked from one warm process, for 0.05 s where it is refused. It has a verdict: it
must be refused ("no": exit code 2 and one line, before the first step), accepted ("yes"), or either ("any": a refusal
comes before the first step). Whatever happens, no traceback, no raw control characters, no value echoed for pages. The
exit code is 1 if any input was handled badly.
"""

import argparse
import io
import json
import math
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST = 1500  # characters of an error
PATIENCE = 30  # seconds
NUMBERS = ("nan", "inf", "-inf", "1e30", "-1e30", "1e400", "-1", "1000000000000000000", "-99999999999999999999", "",
           " ", "abc", "1,5", "0x10", "---", "1e", "None", "9" * 5000, "\x1b[31m1", "1\n2")  # fmt: skip
TEXTS = ("a ball\nand a star", "\x1b[31mred\x1b[0m", "a\tball", "шар", "赤いボール", "🔴" * 9, "a" * 9000,
         "ball " * 1500, "%s %(x)s {} {0}", "-5", "'\"`$(ls)", "\u202eflipped")  # fmt: skip
DEVICES = ("meta", "lazy", "xla", "mkldnn", "opengl", "vulkan", "hpu", "privateuseone", "mtia", "nonsense",
           "cpu:5", "cpu:-1", "cuda:99", "", " ", "cpu cpu", "\x1b[31m", "x" * 5000)  # fmt: skip


@dataclass
class Case:
    """A command line and what must become of it.

    Attributes:
        argv: {work} stands for the folder of inputs, {out} for one of this case alone.
        verdict: "no", "yes" or "any".
        output: what is done to the standard streams: "", "ascii", "cp1252", "closed", "no stderr", "full", "gone".
    """

    name: str
    argv: list[str]
    verdict: str
    output: str = ""


# ------------------------------------------------------------------------------------------------------ inputs

PROMPT = "a red ball is sliding on the grass"
SMALL, MINI = ["--frames", "2", "--size", "32"], ["--checkpoint", "mini"]
BASES = {
    "tune": [*MINI, "--video", "{work}/clip.mp4", "--prompt", PROMPT, *SMALL, "--steps", "1", "--output", "{out}/o"],
    "edit": [*MINI, "--video", "{work}/clip.mp4", "--prompt", PROMPT, *SMALL, "--steps", "1", "--sampling-steps", "1",
             "--edit", "a blue ball", "--output", "{out}/o"],
    "invert": [*MINI, "--video", "{work}/clip.mp4", "--tuned", "{work}/tuned.safetensors", "--sampling-steps", "1",
               "--output", "{out}/n.safetensors"],
    "sample": [*MINI, "--tuned", "{work}/tuned.safetensors", "--noise", "{work}/noise.safetensors",
               "--edit", "a blue ball", "--sampling-steps", "1", "--output", "{out}/o"],
    "evaluate": [*MINI, "--dataset", "{work}/clips.yaml", *SMALL, "--steps", "1", "--sampling-steps", "1",
                 "--output", "{out}/o"],
    "batch": ["{work}/clips.yaml", *MINI, *SMALL, "--steps", "1", "--sampling-steps", "1", "--output", "{out}/o"],
    "metrics": ["--edited", "{work}/clip.mp4", "--source", "{work}/clip.mp4", "--prompt", PROMPT,
                "--output", "{out}/o"],
    "export": [*MINI, "--tuned", "{work}/tuned.safetensors", "--output", "{out}/o"],
    "doctor": [*MINI, *SMALL, "--steps", "1", "--sampling-steps", "1"],
    "demo": ["--steps", "1", "--sampling-steps", "1", "--output", "{out}/o"],
    "bench": ["--layout", "mini", "--frames", "1", "--runs", "1", "--stages", "encode", "--no-memory"],
    "mini train": ["vae", "--vae-steps", "1", "--work", "{out}/w", "--output", "{out}/o", "--renders", "48"],
    "mini render": ["--frames", "2", "--output", "{out}/clip.mp4"],
    "mini previews": ["--output", "{out}/p.safetensors"],
    "mini evaluate": ["--count", "1", "--sampling-steps", "1"],
    "mini controlnet": ["--count", "1", "--sampling-steps", "1"],
    "mini lora": ["--count", "1", "--sampling-steps", "1"],
    "mini benchmark": ["--clips", "0", "--seeds", "1", "--arms", "untuned", "--steps", "1", "--sampling-steps", "1"],
}  # fmt: skip
# commands whose base takes seconds: what they accept is not tried
SLOW = ("batch", "demo", "doctor", "bench", "mini train", "mini previews", "mini evaluate", "mini controlnet",
        "mini lora", "mini benchmark")  # fmt: skip
INPUTS = (
    "video",
    "tuned",
    "noise",
    "checkpoint",
    "comfyui",
    "config",
    "controlnet",
    "hints",
    "lora",
    "embedding",
    "edited",
    "source",
    "mask",
    "clip",
    "pickscore",
    "dino",
    "lpips",
    "raft",
    "dataset",
)
OUTPUTS = ("output", "work", "sheet", "videos", "json")


def arguments_of(command: str) -> dict[str, argparse.Action]:
    """The options of a command by their name, asked of its parser."""
    from tav_core import cli
    from tav_core.mini import cli as mini

    of, name = (mini, command[5:]) if command.startswith("mini ") else (cli, command)
    parser = argparse.ArgumentParser()
    of.COMMANDS[name][1](parser)
    return {action.option_strings[0][2:]: action for action in parser._actions if action.option_strings
            and action.dest != "help"}  # fmt: skip


def changed(command: str, option: str, *values: str) -> list[str]:
    """The base of a command with another value of an option."""
    argv, rest = [], BASES[command]
    at = 0
    while at < len(rest):
        if rest[at] == f"--{option}":
            at += 1
            while at < len(rest) and not rest[at].startswith("--"):
                at += 1
            continue
        argv.append(rest[at])
        at += 1
    return [*command.split(), *argv, f"--{option}", *values]


def of_option(command: str, option: str, action: argparse.Action) -> Iterator[Case]:
    """What is tried on an option, by the kind of its values."""

    def case(verdict: str, value: str) -> Case:
        shown = value if len(value) < 30 else f"{value[:20]}... ({len(value)})"
        joined = [*changed(command, option)[:-1], f"--{option}={value}"]  # "=", as values may begin with a dash
        return Case(f"{command} --{option} {shown!r}", joined, verdict)

    limits = action.type if hasattr(action.type, "least") else None
    if limits:
        for text in NUMBERS:
            yield case("no" if refused(text, limits) else "any", text)
        step = 1 if isinstance(limits.least, int) else 1e-3
        for text in (f"{limits.least - step}", f"{limits.most + step}", "1.5" if step == 1 else "1e-300"):
            yield case("no" if refused(text, limits) else "any", text)
    elif action.choices is not None and action.nargs != 0:
        for text in ("", "nonsense", "\x1b[31m", "x" * 5000, "caf\udce9"):
            yield case("no", text)
    elif option in INPUTS:
        for name in (*BAD_FILES, "l" * 256, "d/" * 3000, "caf\udce9.mp4", "new\nline.mp4", "\x1b[31m.mp4", "", " "):
            if (option, name) != ("video", "images"):
                yield case("no", f"{{work}}/{name}" if name.strip() else name)
    elif option in OUTPUTS:
        for name in ("{work}/text.txt/below", "/proc/none/below", "{out}/" + "l" * 256, "{out}/" + "d/" * 3000,
                     "{out}/caf\udce9", "/dev/null/x", "{work}/loop/x", "", " "):  # fmt: skip
            # a stage of the training that writes nothing there only looks whether it could
            yield case("any" if (command, option) == ("mini train", "output") else "no", name)
    elif option == "device":
        for text in DEVICES:
            yield case("no", text)
    elif option == "size":
        for text in (
            *NUMBERS,
            "20000",
            "0",
            "32x",
            "x32",
            "32x0",
            "33",
            "32x33",
            "-32x32",
            "32X32",
            "1000000x8",
            "0.5x0.5",
        ):
            yield case("no", text)
    elif action.nargs != 0:  # text
        for text in TEXTS:
            yield case("any", text)
        yield case("no", "caf\udce9")
        if option != "negative-prompt":
            yield case("no", "")
            yield case("no", " \n ")


def refused(text: str, limits) -> bool:
    """Whether a number is out of limits, or none."""
    kind = int if isinstance(limits.least, int) else float
    try:
        value = kind(text)
    except ValueError:
        return True
    return not math.isfinite(value) or not limits.least <= value <= limits.most


def idle(commands: dict[str, dict[str, argparse.Action]]) -> Iterator[Case]:
    """Options that do nothing: of other commands, or without the one that gives them something to do."""
    every = {name: action for of in commands.values() for name, action in of.items()}
    for command, own in commands.items():
        for name, action in every.items():
            if name not in own and not any(mine.startswith(name) for mine in own):
                values = [] if action.nargs == 0 else [example(action)]
                yield Case(f"{command} --{name}", [*command.split(), *BASES[command], f"--{name}", *values], "no")
    alone = {"edit": [["--softness", "3"], ["--steady"], ["--no-steady"], ["--context-overlap", "2"],
                      ["--region", "subject"], ["--region", "everything", "--region", "everything"],
                      ["--seed", "1", "2"], ["--edit-seed", "1"], ["--hints", "{work}/images"],
                      ["--control-strength", "1"], ["--control-end", "0.5"], ["--controlnet", "mini"],
                      ["--controlnet", "mini", "--hints", "{work}/images", "--control-start", "1"],
                      ["--controlnet", "mini", "mini", "--hints", "{work}/images"], ["--controlnet"],
                      ["--controlnet", "mini", "--hints", "{work}/images", "{work}/images"],
                      ["--controlnet", "mini", "--hints", "{work}/images", "--control-strength", "1", "1"],
                      ["--embedding", "{work}/tuned.safetensors"], ["--lora", "{work}/tuned.safetensors"],
                      ["--lora", "mini-neon:99"], ["--edit", "0: a | 2: b"], ["--edit", "0: a | 1:"],
                      ["--edit", "1: a | 2: b"], ["--edit", "0: a | 1: b | 1: c"],
                      ["--edit", "(a:99)", "--prompt-weights"], ["--prompt", "0: a | 1: b"],
                      ["--guidance-scale"], ["--guidance-scale", "5", "x"],
                      ["--resume", "--overwrite"]],
             "tune": [["--prompt", PROMPT], ["--video", "{work}/clip.mp4"]],
             "invert": [["--softness", "3"], ["--seed", "1"], ["--context-overlap", "2"]],
             "sample": [["--seed", "1"], ["--frames", "2"], ["--hints", "{work}/images"], ["--edit", "0: a | 9: b"],
                        ["--control-end", "0.5"], ["--lora", "mini-neon"], ["--steady"], ["--context-overlap", "2"],
                        ["--region", "subject"]],
             "demo": [["--context-overlap", "2"], ["--context-length", "9"]],
             "bench": [["--growth"]],
             "mini train": [["--unet-steps", "1"], ["--lora-steps", "1"], ["--channels", "96", "192"],
                            ["--prediction-type", "v_prediction"]],
             "mini benchmark": [["--context-overlap", "2"], ["--context-length", "99"]]}  # fmt: skip
    for command, lists in alone.items():
        for more in lists:
            yield Case(f"{command} {' '.join(more)} alone", [*command.split(), *BASES[command], *more], "no")
    random_noise = [*changed("sample", "noise")[:-1], "--frames", "2"]
    for more in (
        ["--attention-injection", "0.5"],
        ["--caption-as-negative", "0.5"],
        ["--steady"],
        ["--region", "subject"],
        ["--edits-at-once", "2"],
    ):
        yield Case(f"sample {more[0]} of random noise", [*random_noise, *more], "no")


def example(action: argparse.Action) -> str:
    if hasattr(action.type, "least"):
        return str(action.type.least)
    return next(iter(action.choices)) if action.choices else "1"


def of_files() -> Iterator[Case]:
    """Damaged files of our own, and outputs where inputs or other things lie."""
    for name in DAMAGED["state"]:
        argv = ["tune", *BASES["tune"], "--resume"]
        yield Case(f"tune --resume, state: {name}", [*argv, "--output", f"{{work}}/state-{name}"], "no")
    for kind, command in (("tuned", "invert"), ("noise", "sample")):
        for name in DAMAGED[kind]:
            argv = changed(command, kind, f"{{work}}/{kind}-{name}.safetensors")
            yield Case(f"{command} --{kind}: {name}", argv, "no")
    for argv in (
        changed("edit", "output", "{work}/text.txt"),
        changed("edit", "output", "{work}/images", "--video", "{work}/images", "--frames", "2"),
        changed("edit", "output", "{work}/copy", "--video", "{work}/copy/source.mp4"),
        changed("edit", "output", "{work}/copy", "--video", "{work}/copy/comparison.mp4"),
        changed("edit", "output", "{work}/taken"),
        changed("edit", "output", "{work}/other"),
        changed("edit", "output", "{work}"),
        changed("sample", "output", "{work}/other"),
        changed("tune", "output", "{work}/other"),
        changed("tune", "output", "{work}/taken"),
        changed("invert", "output", "{work}/tuned.safetensors"),
        changed("invert", "output", "{work}/clip.mp4"),
        changed("invert", "output", "{work}"),
        changed("export", "output", "{work}"),
        changed("export", "output", "{work}/clip.mp4"),
        changed("sample", "output", "{work}/clip.mp4"),
        changed("mini render", "output", "{out}/clip.txt"),
        changed("mini render", "output", "{work}"),
        changed("mini evaluate", "sheet", "{out}/sheet.txt"),
        changed("mini evaluate", "sheet", "{work}"),
        ["mini", "train", "judge", "--work", "{out}/w"],
        ["mini", "train", "export", "--work", "{out}/w", "--output", "{out}/o"],
        ["edit", *BASES["edit"], "--frames", "1", "--stride", "1000"],
        ["edit", *BASES["edit"], "--start", "7"],
        ["tune", *BASES["tune"], "--frames", "2", "--context-length", "3"],
        ["edit", *BASES["edit"], "--frames", "4", "--context-length", "3", "--context-overlap", "3"],
        ["edit", *BASES["edit"], "--contrast", PROMPT],
        ["edit", *BASES["edit"], "--contrast", "a blue star", "--contrast", " "],
        ["sample", *BASES["sample"], "--edit", ""],
        ["sample", *BASES["sample"], "--sampling-steps", "2"],
        ["sample", *BASES["sample"], "--caption-as-negative", "0"],
        ["sample", *MINI, "--edit", "x", "--output", "{out}/o"],
        changed("edit", "checkpoint")[:-1], changed("sample", "checkpoint")[:-1],
        ["edit"], [], ["nonsense"], ["mini"], ["edit", *BASES["edit"], "--nonsense", "x" * 5000],
        ["edit", *BASES["edit"], "--c", "1"],
    ):  # fmt: skip
        yield Case(" ".join(argv)[:100], argv, "no")


def of_streams() -> Iterator[Case]:
    """Output that can't be shown, or that nobody takes, fails no run."""
    edits = ["--edit", "синий шар\n赤い", "--edit", "\x1b[31mé"]
    for output in ("ascii", "cp1252", "closed", "no stderr", "full", "gone"):
        yield Case(f"edit, {output}", ["edit", *BASES["edit"], *edits, "--output", "{out}/шар é"], "yes", output)
        yield Case(f"sample, {output}", ["sample", *BASES["sample"], "--output", "{out}/шар\x1b[31m"], "yes", output)
        yield Case(f"edit refused, {output}", changed("edit", "video", "{out}/шар\n"), "no", output)
    for command in ("tune", "edit", "invert", "sample", "export", "mini render"):
        yield Case(f"{command} as it should be", [*command.split(), *BASES[command]], "yes")
    for name in ("n" * 255, "new\nline", "\x1b[31m", "шар", " x "):
        yield Case(f"tune --output {name[:20]!r}", changed("tune", "output", f"{{out}}/{name}"), "yes")
        file = f"{name[:200]}.safetensors"
        yield Case(f"invert --output {name[:20]!r}", changed("invert", "output", f"{{out}}/{file}"), "yes")


def at_random(commands, count: int, rng: random.Random) -> Iterator[Case]:
    """Several options at once, each with a value that it takes or doesn't."""
    quick = [command for command in commands if command not in SLOW]
    for number in range(count):
        command = rng.choice(quick)
        more = []
        for name in rng.sample(sorted(commands[command]), rng.randint(2, 4)):
            action = commands[command][name]
            if action.nargs == 0:
                more.append(f"--{name}")
            elif name in (*OUTPUTS, *INPUTS) and rng.random() < 0.7:
                continue
            elif hasattr(action.type, "least"):
                low, high = max(action.type.least, -5), min(action.type.most, 6)
                value = (
                    rng.uniform(low, high) if isinstance(action.type.least, float) else rng.randint(int(low), int(high))
                )
                more.append(f"--{name}={rng.choice([value] * 4 + ['nan', 10**9])}")
            else:
                choices = [*action.choices] if action.choices else ["64", "32x40", "cpu", "mini", "x", PROMPT]
                more.append(f"--{name}={rng.choice(choices)}")
        yield Case(
            f"random {number}: {command} {' '.join(more)}"[:150], [*command.split(), *BASES[command], *more], "any"
        )


def all_cases(seed: int, count: int) -> list[Case]:
    commands = {command: arguments_of(command) for command in BASES}
    cases = [case for command, options in commands.items() for option, action in options.items()
             for case in of_option(command, option, action)
             if case.verdict == "no" or command not in SLOW]  # fmt: skip
    return [*cases, *idle(commands), *of_files(), *of_streams(), *at_random(commands, count, random.Random(seed))]


def sample_of(cases: list[Case], count: int) -> list[Case]:
    """Some of all that are quick, the same ones every time: nothing that a command takes seconds for."""
    quick = [case for case in cases if case.verdict == "no" and not case.name.startswith("mini previews")]
    return random.Random(0).sample(quick, count)


# --------------------------------------------------------------------------------------------------- bad files

BAD_FILES = ("none", "text.txt", "empty", "folder", "fifo", "loop", "zeros.safetensors", "/dev/null", "text.txt/below")
DAMAGED = {
    "tuned": ["truncated", "empty", "zeros", "huge-header", "nested", "other-kind", "nan", "integers", "shape", "lost",
              "no-prompt", "prompt-number", "frames-text", "frames-0", "frames-huge", "width-null", "inflation-list",
              "inflation-more", "inflation-odd", "more-prompts-numbers", "config-open", "rank-text", "rank-of-whole",
              "pickle"],
    "noise": ["truncated", "empty", "zeros", "huge-header", "other-kind", "nan", "integers", "shape", "lost",
              "no-prompt", "no-steps", "steps-text", "steps-digits", "steps--5", "subject-shape", "subject-2",
              "odd-way", "channels"],
    "state": ["truncated", "empty", "zeros", "huge-header", "nested", "other-kind", "nan", "integers", "shape", "lost",
              "no-step", "step--5", "step-text", "step-1.5", "step-huge", "losses-missing", "probe-odd",
              "probe-empty", "scale-0", "scale-text", "fingerprint-list", "moment-negative", "folder", "pickle"],
}  # fmt: skip


def make_files(work: Path, run):
    """The inputs: a clip, and what `run` (of a command line) makes of it, whole and damaged."""
    import numpy as np
    from PIL import Image

    shutil.copy(ROOT / "tav_core" / "mini" / "demo.mp4", work / "clip.mp4")
    (work / "text.txt").write_text("no video\n")
    (work / "empty").touch()
    (work / "zeros.safetensors").write_bytes(bytes(4096))
    (work / "folder").mkdir()
    (work / "images").mkdir()
    for number in range(3):
        Image.fromarray(np.full((32, 32, 3), 80 * number, np.uint8)).save(work / "images" / f"{number}.png")
    (work / "clips.yaml").write_text(f"- {{video: clip.mp4, prompt: {PROMPT}, edits: {{object: a blue ball}}}}\n")
    os.mkfifo(work / "fifo")
    (work / "loop").symlink_to(work / "loop")
    (work / "taken" / "tuned.safetensors").mkdir(parents=True)
    (work / "copy").mkdir()
    (work / "other").mkdir()
    (work / "other" / "summary.json").write_text("[" * 100_000)
    for name in ("source.mp4", "comparison.mp4"):
        shutil.copy(work / "clip.mp4", work / "copy" / name)

    def stopped(terminal):
        call = terminal.Progress.__call__

        def stop(progress, event):
            progress.stopped = getattr(event, "stage", "") == "tune"
            call(progress, event)

        terminal.Progress.__call__ = stop

    for more, setup in (([], None), (["--steps", "2", "--output", str(work / "made")], stopped)):
        run(Case("", ["tune", *BASES["tune"], "--output", str(work), *more], "any"), setup)
    run(Case("", [*changed("invert", "output", str(work / "noise.safetensors"))], "yes"))
    damage(work, work / "made" / "tuning-state.safetensors")


def damage(work: Path, state: Path):
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    wholes = {"tuned": work / "tuned.safetensors", "noise": work / "noise.safetensors", "state": state}
    for kind, whole in wholes.items():
        with safe_open(whole, "pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
        first = "latents" if kind == "noise" else next(name for name in tensors if "attn_temp" in name)
        subject = torch.ones(1, 1, *tensors[first].shape[2:]) if kind == "noise" else None
        deep = "[" * 100_000 + "]" * 100_000
        told = {
            "nested": {"inflation": deep, "fingerprint": deep}, "no-prompt": {"prompt": None},
            "prompt-number": {"prompt": "5"}, "frames-text": {"num_frames": '"two"'}, "frames-0": {"num_frames": "0"},
            "frames-huge": {"num_frames": "9" * 400}, "width-null": {"width": "null"},
            "inflation-list": {"inflation": "[1]"},
            "inflation-more": {"inflation": '{"attention": "first", "temporal_causal": true, "norm": "video", "x": 1}'},
            "inflation-odd": {"inflation": '{"attention": [], "temporal_causal": 1, "norm": null}'},
            "more-prompts-numbers": {"more_prompts": "[1, 2]"}, "config-open": {"config": "{"},
            "rank-text": {"rank": '"2"'}, "rank-of-whole": {"rank": "2"},
            "no-steps": {"steps": None},
            "steps-text": {"steps": "two"}, "steps-digits": {"steps": "9" * 5000},
            "steps--5": {"steps": "-5"},
            "odd-way": {"inverted_with": "magic"}, "no-step": {"step": None}, "step--5": {"step": "-5"},
            "step-text": {"step": '"1"'}, "step-1.5": {"step": "1.5"}, "step-huge": {"step": "9" * 300},
            "probe-odd": {"probe_losses": '[[0, "x"], 5]'}, "probe-empty": {"probe_losses": "[]"},
            "scale-0": {"loss_scale": "[0, 0]"}, "scale-text": {"loss_scale": '"big"'},
            "fingerprint-list": {"fingerprint": "[]"},
        }  # fmt: skip
        moment = next((name for name in tensors if name.startswith("exp_avg_sq.")), "")
        other = {
            "nan": {first: torch.full_like(tensors[first], math.nan)}, "integers": {first: tensors[first].long()},
            "shape": {first: tensors[first].flatten()}, "lost": {first: None}, "losses-missing": {"losses": None},
            "subject-shape": {"subject": torch.zeros(3)}, "subject-2": {"subject": subject},
            "channels": {"latents": torch.zeros(1, 7, 2, 4, 4)}, "moment-negative": {moment: tensors.get(moment)},
        }  # fmt: skip
        if subject is not None:
            subject.add_(1)
        if moment:
            other["moment-negative"][moment] = -torch.ones_like(tensors[moment])
        content = whole.read_bytes()
        raw = {"truncated": content[: len(content) // 2], "empty": b"", "zeros": bytes(99),
               "huge-header": struct.pack("<Q", 2**60) + content[8:]}  # fmt: skip
        for name in DAMAGED[kind]:
            path = work / f"{kind}-{name}.safetensors"
            if kind == "state":
                path = work / f"state-{name}" / "tuning-state.safetensors"
                path.parent.mkdir()
            if name == "folder":
                path.mkdir()
            elif name == "pickle":
                torch.save(tensors, path)
            elif name == "other-kind":
                shutil.copy(wholes["noise" if kind == "tuned" else "tuned"], path)
            elif name in raw:
                path.write_bytes(raw[name])
            else:
                tags = {n: v for n, v in (metadata | told.get(name, {})).items() if v is not None}
                changed_tensors = {n: t for n, t in (tensors | other.get(name, {})).items() if t is not None}
                save_file({n: t.contiguous() for n, t in changed_tensors.items()}, path, tags)


# ----------------------------------------------------------------------------------------------------- running


@dataclass
class Result:
    code: int | None  # None: a signal, or patience, ended it
    out: str
    err: str
    stepped: bool  # whether a step had begun to be told
    seconds: float
    bad: list[str] = field(default_factory=list)


class Runner:
    """Runs command lines in forked children of this process, which has imported all."""

    def __init__(self, work: Path):
        self.work, self.flag = work, mmap.mmap(-1, 8)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import av  # noqa: F401
        import cv2
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
        import torch

        from tav_core import cli, terminal
        from tav_core.mini import cli as mini

        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        self.cli, self.mini, self.terminal = cli, mini, terminal

    def __call__(self, case: Case, setup=None) -> Result:
        out = Path(tempfile.mkdtemp(dir=self.work, prefix="out-"))
        argv = [part.replace("{work}", str(self.work)).replace("{out}", str(out)) for part in case.argv]
        streams = [tempfile.TemporaryFile() for _ in range(2)]
        self.flag[0] = 0
        started = time.monotonic()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            self._child(case, argv, streams, out, setup)
        status = None
        while status is None and time.monotonic() - started < PATIENCE and not (case.verdict == "no" and self.flag[0]):
            done, ended = os.waitpid(child, os.WNOHANG)
            status = ended if done else time.sleep(0.004)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        texts = []
        for stream in streams:
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", "replace"))
            stream.close()
        shutil.rmtree(out, ignore_errors=True)
        code = os.WEXITSTATUS(status) if status is not None and os.WIFEXITED(status) else None
        result = Result(code, *texts, bool(self.flag[0]), time.monotonic() - started)
        result.bad = judge(case, result)
        return result

    def _child(self, case: Case, argv: list[str], streams, out: Path, setup):
        code = 70
        try:
            os.setsid()
            self._streams(case.output, streams)
            os.chdir(out)
            if setup:
                setup(self.terminal)
            call = self.terminal.Progress.__call__

            def noted(progress, event):
                if getattr(event, "stage", "encode") != "encode":
                    self.flag[0] = 1
                return call(progress, event)

            self.terminal.Progress.__call__ = noted
            main = self.cli.main
            if argv[:1] == ["mini"]:
                main, argv = self.mini.main, argv[1:]
            sys.argv = ["tav", *argv]
            try:
                main()
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
            except BaseException:
                code = 1
                os.write(streams[1].fileno(), traceback.format_exc().encode("utf-8", "replace"))
            try:
                for stream in filter(None, (sys.stderr, sys.stdout)):
                    stream.flush()
            except Exception:  # as the interpreter does at its end
                code = 120
        finally:
            os._exit(code)

    def _streams(self, output: str, streams):
        encoding = output if output in ("ascii", "cp1252") else "utf-8"
        ends = [stream.fileno() for stream in streams]
        if output == "full":
            ends[0] = os.open("/dev/full", os.O_WRONLY)
        elif output == "gone":  # a pipe that nobody reads
            reading, ends[0] = os.pipe()
            os.close(reading)
        for number, end in enumerate(ends, 1):
            os.dup2(end, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), encoding=encoding, errors="strict")
        errors = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), encoding=encoding, errors="backslashreplace")
        sys.stderr = errors
        if output == "closed":
            sys.stdout = None
        if output == "no stderr":
            sys.stderr = None


def told_lines(err: str) -> list[str]:
    """Without progress bars and warnings."""
    lines = [line for line in err.replace("\r", "\n").split("\n") if line.strip()]
    return [line for line in lines if "step/s" not in line and "?step" not in line and "s/step" not in line
            and "generate:" not in line and "Warning" not in line and "warnings.warn" not in line
            and not line.startswith("clip ")]  # fmt: skip


def judge(case: Case, result: Result) -> list[str]:
    """What is wrong with what became of a case."""
    bad, lines = [], told_lines(result.err)
    if "Traceback" in result.err or "Traceback" in result.out:
        bad.append("traceback")
    if result.code not in (0, 2) and not (case.verdict == "no" and result.stepped):
        bad.append("no end" if result.code is None else f"exit code {result.code}")
    if case.verdict == "no" and (result.code == 0 or result.stepped):
        bad.append("nonsense accepted")
    if case.verdict == "yes" and result.code != 0:
        bad.append("refused, though it is right")
    if result.code == 2 and result.stepped:
        bad.append("refused after the first step")
    if result.code == 2 and case.output != "no stderr":
        if len(lines) != 1:
            bad.append(f"{len(lines)} lines")
        elif len(lines[0]) > LONGEST:
            bad.append(f"a line of {len(lines[0])} characters")
    if "\x1b[31m" in result.err + result.out:
        bad.append("control characters")
    return bad


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random", type=int, default=300, help="so many lines of several options")
    parser.add_argument("--only", default="", help="cases whose name has this text")
    parser.add_argument("--pack", type=Path, default=ROOT, help="another checkout to try")
    parser.add_argument("--cases", type=Path, help="a file of cases: read if it is there, else written")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), help="K N: every N-th case from the K-th on")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, str(args.pack.resolve()))
    work = Path(tempfile.mkdtemp(prefix="fuzz-cli-"))
    runner = Runner(work)
    if args.cases and args.cases.exists():
        cases = [Case(**case) for case in json.loads(args.cases.read_text())]
    else:
        cases = all_cases(args.seed, args.random)
        if args.cases:
            args.cases.write_text(json.dumps([case.__dict__ for case in cases]))
    make_files(work, runner)
    cases = [case for case in cases if args.only in case.name][args.part[0] :: args.part[1]]
    kinds, bad, slowest = Counter(), 0, []
    for number, case in enumerate(cases, 1):
        if number % 250 == 0:
            print(f"{number} of {len(cases)}", flush=True)
        result = runner(case)
        slowest.append((result.seconds, case.name))
        kinds.update({kind.split(" of ")[0] for kind in result.bad})
        if result.bad:
            bad += 1
            shown = (told_lines(result.err) or [""])[-1][:200]
            print(f"BAD {', '.join(result.bad)}: {case.name!r}\n    {shown!r}", flush=True)
        elif args.verbose:
            print(f"ok {result.code} {result.seconds:.2f} s {case.name!r}: {(told_lines(result.err) or [''])[-1]!r}")
    shutil.rmtree(work, ignore_errors=True)
    print(f"{len(cases)} inputs, {bad} handled badly; {dict(kinds)}")
    print("slowest: " + ", ".join(f"{seconds:.1f} s {name!r}" for seconds, name in sorted(slowest)[-5:]))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
