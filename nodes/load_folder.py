"""Load Video Folder: all clips of a folder with their sentences, as lists: ComfyUI runs a graph for each."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..tav_core import TavError
from ..tav_core.checkpoint import MINI
from ..tav_core.limits import check_pixels
from .common import inside, schema
from .errors import plain_errors
from .folders import listed
from .inputs import check_name, checked, told, usable
from .load_video import frame_inputs, is_video, loaded
from .load_video import path_of as path_of_clip

DEMO = "demo clips of the mini checkpoint"
SHIPPED = {DEMO: MINI.parent / "batch"}
LONGEST_TEXT = 1 << 16  # bytes of sentences


def choices() -> list[str]:
    """Folders of the input folder that hold clips, and the one that ships with the pack."""
    folders = listed(folder_paths.get_input_directory())[1]
    return [*(folder for folder in folders if clips_in(folder)), *SHIPPED]


def clips_in(folder: str) -> list[Path]:
    """The clips of a choice, by their names."""
    if folder in SHIPPED:
        return sorted(SHIPPED[folder].glob("*.mp4"))
    names = listed(Path(folder_paths.get_input_directory()) / folder)[0]
    return [path_of_clip(name) for name in (f"{folder}/{name}" for name in names) if is_video(name)]


def path_of(folder: str) -> Path:
    """The path of a choice.

    Raises:
        TavError: it is no name, lies outside of the input folder, or holds no clip.
    """
    check_name("folder", folder)
    if folder in SHIPPED:
        return SHIPPED[folder]
    root = Path(folder_paths.get_input_directory()).resolve()
    path = inside(root, folder, "folder", linked=True)
    if path == root or not path.is_dir():
        raise TavError("folder", folder, "is no folder in ComfyUI's input folder", "put your clips into one there")
    if not clips_in(folder):
        raise TavError("folder", folder, "holds no video", "put your clips there, or choose another one")
    return path


def text_of(clip: Path) -> Path:
    """The path of a clip's .txt. Raises a TavError for a link that leads out of the folder."""
    return inside(clip.parent, f"{clip.stem}.txt", "folder")


def sentences_of(clip: Path, line: str | None) -> tuple[str, str]:
    """What a clip shows and what it should show: the lines of its .txt, or a line that has both around a semicolon.

    Raises:
        TavError: there is neither, or the file holds no text.
    """
    path = text_of(clip)
    try:
        if path.is_file():
            with open(path, encoding="utf-8-sig") as file:
                lines = file.read(LONGEST_TEXT).splitlines()
        else:
            lines = (line or "").split(";", 1)
    except (OSError, ValueError) as error:
        raise TavError("folder", path.name, f"can't be read ({error})", "write it as plain text") from error
    said = [each.strip() for each in lines if each.strip()]
    if not said:
        problem, remedy = f"says nothing about {clip.name}", f"write its sentence into {path.name}, or a line here"
        raise TavError("folder", clip.parent.name, problem, remedy)
    return said[0], said[min(1, len(said) - 1)]


class LoadVideoFolder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TAVLoadVideoFolder",
            display_name="Load Video Folder (Tune-A-Video)",
            description="Loads every clip of a folder with its sentences. The outputs are lists: whatever they are "
            "connected to runs once for each clip.",
            search_aliases=["batch", "several clips", "load videos", "directory"],
            inputs=[
                io.Combo.Input("folder", options=choices(), tooltip="A folder of videos in ComfyUI's input folder. A "
                               ".txt beside a clip, of the same name, says in its first line what the clip shows, and "
                               "in its second what it should show."),
                io.String.Input("sentences", default="", multiline=True, tooltip="A line for each clip that has no "
                                ".txt, by their names: a ball on the grass; a star on the grass."),
                *frame_inputs(),
            ],
            outputs=[
                io.Image.Output(display_name="images", is_output_list=True, tooltip="The frames of each clip."),
                io.Float.Output(display_name="fps", is_output_list=True,
                                tooltip="Frames a second at this stride: for Create Video."),
                io.Audio.Output(display_name="audio", is_output_list=True,
                                tooltip="What is heard meanwhile: for Create Video. Empty for a clip without sound."),
                io.String.Output(display_name="prompt", is_output_list=True, tooltip="What each clip shows."),
                io.String.Output(display_name="edit", is_output_list=True,
                                 tooltip="What it should show; the same, if nothing says so."),
                io.String.Output(display_name="name", is_output_list=True,
                                 tooltip="Its name, for prefixes and names of files."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, folder=None, fit=None) -> bool | str:
        wrong = usable(path_of, folder)
        return told(cls, fit=fit) if wrong is True else wrong

    @classmethod
    def fingerprint_inputs(cls, folder, **_):
        files = [file for clip in clips_in(folder) for file in (clip, text_of(clip)) if file.is_file()]
        return [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files]

    @classmethod
    @checked
    def execute(cls, folder, sentences, start, stride, count, width, height, fit) -> io.NodeOutput:
        frames = dict(start=start, stride=stride, count=count, width=width, height=height, fit=fit)
        with plain_errors():
            path_of(folder)  # raises for one that can't be
            clips, lines = clips_in(folder), iter([line for line in sentences.splitlines() if line.strip()])
            check_pixels(len(clips) * count, width, height)
            said = [sentences_of(clip, None if text_of(clip).is_file() else next(lines, None)) for clip in clips]
            if left := len(list(lines)):
                problem = f"has {left} lines more than clips without a .txt"
                raise TavError("sentences", None, problem, "give one for each of these clips")
            images, rates, _, heard = zip(*(loaded(clip, **frames) for clip in clips))
        prompts, edits = zip(*said)
        return io.NodeOutput(*map(list, (images, rates, heard, prompts, edits, [clip.stem for clip in clips])))
