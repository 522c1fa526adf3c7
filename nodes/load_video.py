"""Load Video: a clip from ComfyUI's input folder, only the frames that are wanted."""

import logging
from pathlib import Path

import comfy.model_management
import folder_paths
from comfy_api.latest import io
from torch import Tensor

from ..tav_core import Note, TavError, load_video
from ..tav_core.checkpoint import MINI
from ..tav_core.containers import VIDEOS
from ..tav_core.events import Event
from ..tav_core.pictures import is_animated, pictures
from ..tav_core.video import FITS
from .common import inside, schema, to_images
from .errors import plain_errors
from .folders import listed
from .inputs import check_name, checked, told, usable

DEMO = "demo clip of the mini checkpoint"
HINTS = "silhouettes for the mini ControlNet"
SHIPPED = {DEMO: MINI.parent / "demo.mp4", HINTS: MINI.parent / "hints.mp4"}


def choices() -> list[str]:
    """Videos and folders of images in the input folder, and the clips that ship with the pack.

    What can't be looked at, or would be refused, is left out.
    """
    files, folders = listed(folder_paths.get_input_directory())
    return [*filter(is_video, files), *filter(_holds_pictures, folders), *SHIPPED]


def is_video(name: str) -> bool:
    """Whether a name in the input folder is that of a file that can be shown in the menu."""
    try:
        path = path_of(name)
        return not Path(name).name.startswith(".") and (Path(name).suffix.lower() in VIDEOS or is_animated(path))
    except (TavError, OSError):
        return False


def _holds_pictures(name: str) -> bool:
    try:
        return not name.startswith(".") and any(picture.is_file() for picture in pictures(path_of(name)))
    except (TavError, OSError):
        return False


def path_of(file: str) -> Path:
    """The path of a choice. An entry of the input folder may be a link to elsewhere; what is in it may not.

    Raises:
        TavError: it is no name, lies outside of the input folder, or an image of the folder does, or it doesn't exist.
    """
    check_name("file", file)
    if file in SHIPPED:
        return SHIPPED[file]
    root = Path(folder_paths.get_input_directory()).resolve()
    path = inside(root, file.removesuffix(" [input]"), "file", linked=True)
    if path == root or not path.exists():
        raise TavError("file", file, "is not in ComfyUI's input folder", "upload it, or choose another one")
    if path.is_dir():
        for picture in pictures(path):
            if picture.is_symlink():
                inside(path, picture.name, "file")
    return path


def frame_inputs() -> list[io.Input]:
    """What says which frames are taken, and how large they are."""
    return [
        io.Int.Input("start", default=0, min=0, max=1_000_000,
                     tooltip="The first frame that is taken, from 0."),
        io.Int.Input("stride", default=1, min=1, max=1000,
                     tooltip="Takes every n-th frame: a larger stride covers more motion with as many frames."),
        io.Int.Input("count", default=8, min=1, max=1000,
                     tooltip="How many frames. Time and memory grow with it; 8 to 24 are usual."),
        io.Int.Input("width", default=512, min=16, max=4096, step=8,
                     tooltip="Width of the frames in pixels: 512 for SD 1.5, 768 for SD 2.1, 128 for mini."),
        io.Int.Input("height", default=512, min=16, max=4096, step=8,
                     tooltip="Height of the frames in pixels."),
        io.Combo.Input("fit", options=list(FITS), default="crop",
                       tooltip="crop cuts what is too much, pad adds black bars, stretch distorts."),
    ]  # fmt: skip


def _callback(event: Event):
    """Cancel is answered while a clip is read."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    if isinstance(event, Note):
        logging.warning(event.text)


def loaded(path: Path, **frames) -> tuple[Tensor, float, int, dict | None]:
    """IMAGE, frames a second, how many, and AUDIO of a clip. Raises as `load_video`."""
    clip = load_video(path, **frames, callback=_callback)
    heard = clip.sound and {"waveform": clip.sound.samples[None], "sample_rate": clip.sound.rate}
    return to_images(clip.frames), clip.fps, len(clip.frames), heard


class LoadVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TAVLoadVideo",
            display_name="Load Video (Tune-A-Video)",
            description="Loads some frames of a video, gif or folder of images, brought to one size. "
            "Tune-A-Video works on few frames: 8 to 24 that show the motion.",
            search_aliases=["load video frames", "import video", "image sequence"],
            inputs=[
                io.Combo.Input("file", options=choices(), upload=io.UploadType.video,
                               tooltip="A video or gif, or a folder of images, in ComfyUI's input folder."),
                *frame_inputs(),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The frames as a batch."),
                io.Float.Output(display_name="fps", tooltip="Frames a second at this stride: for Create Video."),
                io.Int.Output(display_name="count", tooltip="How many frames there are."),
                io.Audio.Output(display_name="audio",
                                tooltip="What is heard meanwhile: for Create Video. Empty for a clip without sound."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, file=None, fit=None) -> bool | str:
        wrong = usable(path_of, file)
        return told(cls, fit=fit) if wrong is True else wrong

    @classmethod
    def fingerprint_inputs(cls, file, **_):
        path = path_of(file)
        inner = [picture.stat() for picture in pictures(path) if picture.exists()] if path.is_dir() else []
        return [(stat.st_mtime_ns, stat.st_size) for stat in (path.stat(), *inner)]

    @classmethod
    @checked
    def execute(cls, file, start, stride, count, width, height, fit) -> io.NodeOutput:
        frames = dict(start=start, stride=stride, count=count, width=width, height=height, fit=fit)
        with plain_errors():
            return io.NodeOutput(*loaded(path_of(file), **frames))
