"""Compare: several clips, labelled, as one picture or one video."""

from comfy_api.latest import io

from ..tav_core import TavError, side_by_side, strip
from .common import from_images, image_of, schema, to_images
from .errors import plain_errors
from .inputs import checked

MOST = 6


class Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TAVCompare",
            display_name="Compare (Tune-A-Video)",
            description="Puts clips side by side with their labels: as a video for Create Video, and as a strip of "
            "frames.",
            search_aliases=["before after", "side by side", "grid", "contact sheet"],
            advanced=("columns",),
            inputs=[
                io.Image.Input("images_1", tooltip="A clip, for instance the source."),
                *(io.Image.Input(f"images_{i}", optional=True, tooltip="Another clip.") for i in range(2, MOST + 1)),
                io.String.Input("labels", default="source\nedit", multiline=True, tooltip="A line for each clip."),
                io.Int.Input("columns", default=8, min=1, max=64, tooltip="Frames a row in the strip."),
            ],
            outputs=[
                io.Image.Output(display_name="video",
                                tooltip="The clips side by side, frame by frame: for Create Video."),
                io.Image.Output(display_name="strip", tooltip="A row of frames a clip, in one picture."),
            ],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, images_1, labels, columns, **others) -> io.NodeOutput:
        clips = [images_1, *(others[name] for name in sorted(others) if others[name] is not None)]
        names = [line.strip() for line in labels.splitlines()]
        names += [""] * (len(clips) - len(names))
        with plain_errors(videos="images"):
            if len(names) > len(clips) and any(names[len(clips) :]):
                raise TavError(
                    "labels", None, f"has {len(names)} lines for {len(clips)} clips", "give one line for each"
                )
            clips, names = [from_images(clip) for clip in clips], names[: len(clips)]
            video = side_by_side(clips, names)
            return io.NodeOutput(to_images(video), image_of(strip(clips, names, columns=columns)))
