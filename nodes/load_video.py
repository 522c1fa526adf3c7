"""Load Video: a clip from ComfyUI's input folder, only the frames that are wanted."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..tav_core import TavError, load_video
from ..tav_core.checkpoint import MINI
from ..tav_core.video import FITS, IMAGES
from .common import inside, plain_errors, schema, to_images
from .folders import listed
from .inputs import check_name, checked, told, usable

DEMO = "demo clip of the mini checkpoint"
HINTS = "silhouettes for the mini ControlNet"
SHIPPED = {DEMO: MINI.parent / "demo.mp4", HINTS: MINI.parent / "hints.mp4"}


def choices() -> list[str]:
    """Videos and folders of images in the input folder, and the clips that ship with the pack."""
    root = Path(folder_paths.get_input_directory())
    files, folders = ([name for name in names if not name.startswith(".")] for names in listed(root))
    videos = {*folder_paths.filter_files_content_types(files, ["video"]), *(f for f in files if f.endswith(".gif"))}
    folders = [folder for folder in folders if any(name.lower().endswith(IMAGES) for name in listed(root / folder)[0])]
    return [*sorted(videos), *folders, *SHIPPED]


def path_of(file: str) -> Path:
    """The path of a choice.

    Raises:
        TavError: it is no name, lies outside of the input folder, or doesn't exist.
    """
    check_name("file", file)
    if file in SHIPPED:
        return SHIPPED[file]
    root = Path(folder_paths.get_input_directory()).resolve()
    path = inside(root, file.removesuffix(" [input]"), "file")
    if path == root or not path.exists():
        raise TavError("file", file, "is not in ComfyUI's input folder", "upload it, or choose another one")
    return path


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
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The frames as a batch."),
                io.Float.Output(display_name="fps", tooltip="Frames a second at this stride: for Create Video."),
                io.Int.Output(display_name="count", tooltip="How many frames there are."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, file=None, fit=None) -> bool | str:
        wrong = usable(path_of, file)
        return told(cls, fit=fit) if wrong is True else wrong

    @classmethod
    def fingerprint_inputs(cls, file, **_):
        path = path_of(file)
        inner = [entry.stat() for entry in path.iterdir()] if path.is_dir() else []
        return [(stat.st_mtime_ns, stat.st_size) for stat in (path.stat(), *inner)]

    @classmethod
    @checked
    def execute(cls, file, start, stride, count, width, height, fit) -> io.NodeOutput:
        with plain_errors():
            clip = load_video(
                path_of(file), start=start, stride=stride, count=count, width=width, height=height, fit=fit
            )
        return io.NodeOutput(to_images(clip.frames), clip.fps, len(clip.frames))
