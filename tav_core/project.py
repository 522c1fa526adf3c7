"""The output folder of edits: a clip that is tuned once, and edits of it, each with a number and settings of its own.

`summary.json` tells all of it, and is written anew behind every edit, or behind those that are drawn together: what a
stopped run has finished is part of the project. Nothing that is there is drawn again or replaced; who deletes an edit's
video takes it out.
"""

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from . import errors
from .atomic import atomic_path
from .errors import TavError
from .injection import ROOM, EditPlaces
from .metrics import flicker, frame_difference, motion_fidelity, psnr
from .noise import InvertedNoise
from .page import page
from .sound import Sound
from .video import load_video, save_video
from .visuals import grid, side_by_side, strip

SUMMARY, NOISE = "summary.json", "noise.safetensors"
SHOWN = ["strip.png", "comparison.mp4", "index.html"]  # of the whole project, drawn anew with every edit
NAMED = ("source", "subject", "reconstruction")  # videos that aren't edits
SWEPT = ("seed", "guidance_scale", "attention_injection")  # settings of an edit that a command takes several values of
# by what edits of one sentence are told apart
TOLD_APART = ("region", *SWEPT, "negative_prompt", "caption_as_negative", "guidance_rescale", "guidance_start",
              "guidance_end", "sampling_steps", "steady", "subject", "mask", "contrast", "eta", "context_length",
              "context_overlap", "lora", "embedding", "prompt_weights", "controlnet", "hints", "control_strength",
              "control_start", "control_end", "dtype", "noise", "frames", "fps", "sound")  # fmt: skip


@dataclass
class Project:
    """A folder of edits.

    Attributes:
        summary: what its summary.json holds. `edits` are in the order of their numbers, each with its file, settings
            and figures.
        videos: uint8 `f h w c` by file, as far as this run has drawn them; others are read.
    """

    folder: Path
    summary: dict[str, Any]
    videos: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def at(cls, folder: Path) -> "Project":
        """That in a folder, or a new one.

        Raises:
            TavError: it has a summary of another kind.
        """
        if not (folder / SUMMARY).exists():
            return cls(folder, {"edits": []})
        summary = read_summary(folder, "output", f"choose another {errors.field('output')}, or delete it")
        summary["edits"] = [edit for edit in summary["edits"] if (folder / edit["file"]).is_file()]
        for name in NAMED:
            if name in summary and not (folder / summary[name]["file"]).is_file():
                del summary[name]
        return cls(folder, summary)

    @property
    def edits(self) -> list[dict[str, Any]]:
        return self.summary["edits"]

    @property
    def next_number(self) -> int:
        """Of the next edit: files of earlier versions, which no summary tells of, have their numbers, too."""
        found = [re.match(r"edit-(\d{1,9})-", path.name) for path in self.folder.glob("edit-*")]
        return 1 + max([edit["number"] for edit in self.edits] + [int(match[1]) for match in found if match], default=0)

    def check_same(self, of: str, shown: Any, known: Mapping[str, Any], name: str, value: Any, remedy: str):
        """Raises a TavError, about the field `of`, for what isn't as the project has it, if it has.

        Args:
            shown: what stands for the value, if that is a hash.
            known: what the project has, by name.
        """
        if known.get(name, value) != value:
            own = as_text(known[name])
            told = f"not the {own} of" if shown is value else "another one than that of"
            told = "given, and there is none in" if shown is value and own == "none" else told
            raise TavError(of, shown, f"is {told} the project in {self.folder}", remedy)

    def find(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The edit with these settings, if there is one."""
        return next((edit for edit in self.edits if all(edit.get(k) == v for k, v in settings.items())), None)

    def add(self, settings: dict[str, Any], video: Tensor, sound: Sound | None, mask: Tensor | None) -> dict[str, Any]:
        """Writes an edit's video; the summary tells of it when that is written (see `Project.write`).

        Args:
            settings: all that decides on what it shows, with `prompt` and `fps`.
            mask: where it may differ from the source, 0 ... 1, `f h w`.
        """
        number = self.next_number
        edit = {"number": number, "file": f"{file_name(number, settings['prompt'])}.mp4", **settings}
        edit["figures"] = self._figures(video, mask)
        self._save(edit["file"], video, settings["fps"], sound)
        self.edits.append(edit)
        return edit

    def put(self, name: str, video: Tensor, fps: float, sound: Sound | None, told: Mapping[str, Any] | None = None):
        """Writes one of the videos that aren't edits (see `NAMED`), and what is told of it."""
        self._save(f"{name}.mp4", video, fps, sound)
        figures = self._figures(video) if name != "subject" else {}
        self.summary[name] = {"file": f"{name}.mp4", **(told or {}), "figures": figures}
        self.write()

    def _save(self, file: str, video: Tensor, fps: float, sound: Sound | None):
        save_video(video, self.folder / file, fps, sound)
        self.videos[file] = video

    def _figures(self, video: Tensor, mask: Tensor | None = None) -> dict[str, float]:
        """Those that need no model (see `measure.FIGURES`); what has no value is left out."""
        figures = {"flicker": flicker(video), "frame_difference": frame_difference(video)}
        source = self.video("source") if "source" in self.summary else None
        if source is not None and source.shape == video.shape and source is not video:
            figures = {
                "psnr_rest": psnr(video, source, mask),
                "motion_fidelity": motion_fidelity(video, source),
            } | figures
        return {name: round(value, 4) for name, value in figures.items() if math.isfinite(value)}

    def video(self, name: str) -> Tensor:
        """One of `NAMED`, or that of a file."""
        file = self.summary[name]["file"] if name in NAMED else name
        if file not in self.videos:
            self.videos[file] = load_video(self.folder / file, sound=False).frames
        return self.videos[file]

    def timed(self, stage: str, function: Callable, *args, **kwargs) -> Any:
        """What a function returns; its seconds are added to those of the stage."""
        started, seconds = time.monotonic(), self.summary.setdefault("seconds", {})
        value = function(*args, **kwargs)
        seconds[stage] = round(seconds.get(stage, 0) + time.monotonic() - started, 2)
        return value

    def show(self, fps: float, sound: Sound | None):
        """Strip, comparison and page of all edits."""
        videos, told = [self.video(edit["file"]) for edit in self.edits], self.told()

        def with_named(names: Sequence[str]) -> tuple[list[Tensor], list[str]]:
            there = [name for name in names if name in self.summary]
            return [*map(self.video, there), *videos], [*there, *told]

        strip(*with_named(NAMED), self.folder / "strip.png")
        together = side_by_side(*with_named(("source", "reconstruction")))
        save_video(together, self.folder / "comparison.mp4", fps, sound)
        self.write_page()

    def told(self) -> list[str]:
        """What the edits are called, with their numbers."""
        return [f"{edit['number']}. {label}" for edit, label in zip(self.edits, labels(self.edits))]

    def made_by(self, command: str):
        """Tells of a command that has added to it, in summary and page."""
        self.summary["commands"] = list(dict.fromkeys([*self.summary.get("commands", []), command]))
        self.write_page()

    def write_page(self):
        """The page and the summary."""
        with atomic_path(self.folder / "index.html") as path:
            path.write_text(self._page(), encoding="utf-8")
        self.write()

    def _page(self) -> str:
        summary, own = self.summary, ("number", "file", "figures")
        size = "{}x{}".format(*summary["size"])
        facts = [summary["checkpoint"], f"{summary['frames']} frames of {size}", f"{summary['fps']:g} a second"]
        edits = [{**edit, "label": label, "settings": [(name, as_text(value)) for name, value in edit.items()
                                                       if name not in own and value is not None]}
                 for label, edit in zip(self.told(), self.edits)]  # fmt: skip
        tuning = {}
        if "probe_loss" in summary:
            tuning = {f"probe_loss_{when}": value for when, value in summary["probe_loss"].items()}
            tuning |= summary["model"] | summary["settings"]["tuning"]
        return page(
            "project.html",
            summary=summary,
            facts=facts,
            named=[(name, summary[name]) for name in NAMED if name in summary],
            edits=edits,
            grids=summary.get("grids", []),
            tuning=[(name, as_text(value)) for name, value in tuning.items()],
            commands=summary.get("commands", []),
        )

    def show_grid(self, edits: Sequence[dict[str, Any]], fps: float):
        """The edits of a sweep, every combination of some settings, as a table: a video, and a picture of its middle.

        The last setting that varies goes along the columns. Of what is no whole table nothing is written.
        """
        axes = [name for name in SWEPT if len({edit[name] for edit in edits}) > 1]
        if not axes:
            return
        column = axes[-1]
        told = labels([{**edit, column: None} for edit in edits], axes[:-1])
        rows, columns = list(dict.fromkeys(told)), sorted({edit[column] for edit in edits})
        cells = {(row, edit[column]): self.video(edit["file"]) for row, edit in zip(told, edits)}
        if len(cells) < len(rows) * len(columns):
            return
        names = [_told(column, value) for value in columns]
        video = grid([[cells[row, value] for value in columns] for row in rows], rows, names)
        numbers = [edit["number"] for edit in edits]
        name, title = f"grid-{min(numbers)}", " and ".join(axis.replace("_", " ") for axis in axes)
        save_video(video, self.folder / f"{name}.mp4", fps)
        with atomic_path(self.folder / f"{name}.png") as path:
            Image.fromarray(video[len(video) // 2].numpy()).save(path)
        drawn = {"title": title, "file": f"{name}.mp4", "picture": f"{name}.png", "edits": numbers}
        others = [each for each in self.summary.get("grids", []) if each["file"] != drawn["file"]]
        self.summary["grids"] = [*others, drawn]

    def write(self):
        """The summary, with the edits behind all else."""
        self.summary["edits"] = self.summary.pop("edits")
        write_json(self.folder / SUMMARY, self.summary)

    def remove(self):
        """Removes all that it has written."""
        named = [self.summary[name] for name in NAMED if name in self.summary]
        grids = self.summary.get("grids", [])
        files = [each["file"] for each in (*self.edits, *named, *grids)] + [each["picture"] for each in grids]
        for file in (*files, *SHOWN, SUMMARY):
            (self.folder / file).unlink(missing_ok=True)


def labels(edits: Sequence[dict[str, Any]], always: Sequence[str] = ()) -> list[str]:
    """What an edit is called beside others: its sentence, behind what tells it apart from others of that sentence.

    So it is seen where a long sentence has to be cut.
    """
    told = []
    for edit in edits:
        alike = [other for other in edits if other["prompt"] == edit["prompt"]]
        apart = [name for name in TOLD_APART if name in always or len({repr(each.get(name)) for each in alike}) > 1]
        settings = ", ".join(_told(name, edit[name]) for name in apart if edit.get(name) not in (None, ""))
        told.append(f"{settings}: {edit['prompt']}" if settings else edit["prompt"])
    return told


def _told(name: str, value: Any) -> str:
    return f"{name.replace('_', ' ')} {as_text(value)}"


def as_text(value: Any) -> str:
    """A setting for people."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return ", ".join(map(as_text, value))
    return "none" if value in (None, "") else f"{value:g}" if isinstance(value, float) else str(value)


def changeable(region: str, noise: InvertedNoise) -> Tensor | None:
    """Where an edit of a region may differ from the clip, 0 ... 1, `f h w`; None for everywhere."""
    if region == "everything" or noise.subject is None:
        return None
    margin = noise.subject.shape[3] // noise.latents.shape[3]
    room = ROOM if noise.contrasts else 0
    return EditPlaces.of(region, noise.subject, margin, room=room).changeable[0, 0]


def read_summary(folder: Path, of: str, remedy: str) -> dict[str, Any]:
    """What summary.json in a folder tells.

    Raises:
        TavError: about the field `of`, for one that isn't of a project.
    """
    try:
        summary = json.loads((folder / SUMMARY).read_text("utf-8"))
        for each in [*summary["edits"], *(summary[name] for name in NAMED if name in summary)]:
            if Path(each["file"]).name != each["file"] or not isinstance(each["figures"], dict):
                raise ValueError(f"its file is {each['file']!r}")
        for edit in summary["edits"]:
            if [type(edit[name]) for name in ("number", "prompt", "region")] != [int, str, str]:
                raise ValueError(f"its number is {edit['number']!r}")
            [edit[name] for name in SWEPT]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"holds a {SUMMARY} that is no project's, or an earlier version's ({type(error).__name__}: {error})"
        raise TavError(of, folder, problem, remedy) from error
    return summary


def file_name(number: int, prompt: str) -> str:
    """Of an edit, without suffix."""
    return f"edit-{number}-{re.sub('[^a-z0-9]+', '-', prompt.lower()).strip('-')[:60]}"


def write_json(path: Path, content: dict):
    with atomic_path(path) as temporary:
        # names of files as they are: commands are copied from it
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
