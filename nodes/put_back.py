"""Put Back: the clip's own pixels, wherever an edit may change nothing."""

from comfy_api.latest import io
from einops import rearrange

from ..tav_core import TavError
from ..tav_core.injection import REGIONS, EditPlaces
from ..tav_core.subject import put_back
from .common import from_images, schema, to_images
from .errors import plain_errors
from .inputs import checked, told

PARTS = [region for region in REGIONS if region != "everything"]


class PutBack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TAVPutBack",
            display_name="Put Back the Clip (Tune-A-Video)",
            description="Puts the clip's own pixels back into a decoded edit, wherever Attention Injection let it "
            "change nothing: a VAE never returns them exactly.",
            search_aliases=["composite", "paste", "keep background", "mask"],
            advanced=("margin",),
            inputs=[
                io.Image.Input("images", tooltip="The edit, from VAE Decode."),
                io.Image.Input("clip", tooltip="The clip, from Load Video: the frames that were encoded."),
                io.Mask.Input("subject", tooltip="The mask that Attention Injection has: one, or one for each frame."),
                io.Combo.Input("region", options=PARTS, default=PARTS[0],
                               tooltip="What the edit may change, as in Attention Injection: the subject or its shape "
                                       "(all else is put back) or the background (the subject is put back)."),
                io.Int.Input("margin", default=8, min=0, max=512,
                             tooltip="Pixels around the subject that an edit of it may change, for one of another "
                                     "shape. 8 is what Attention Injection leaves it."),
            ],
            outputs=[io.Image.Output(tooltip="For Create Video, Compare and so on.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, region=None) -> bool | str:
        return told(cls, region=region)

    @classmethod
    @checked
    def execute(cls, images, clip, subject, region, margin) -> io.NodeOutput:
        with plain_errors():
            if images.shape[:3] != clip.shape[:3]:
                (f, h, w, _), (g, i, j, _) = images.shape, clip.shape
                problem = f"are {f} of {w} x {h}, clip is {g} of {j} x {i}"
                raise TavError("images", None, problem, "give the frames that were encoded, and an edit of their size")
            if subject.shape[1:] != clip.shape[1:3] or len(subject) not in (1, len(clip)):
                count, h, w = subject.shape
                problem = f"is {count} of {w} x {h} for {len(clip)} frames of {clip.shape[2]} x {clip.shape[1]}"
                raise TavError("subject", None, problem, "give one mask of the clip's size, or one for each frame")
            mask = rearrange(subject.expand(len(clip), -1, -1).float().cpu(), "f h w -> 1 1 f h w")
            changed = EditPlaces.of(region, mask, margin).changeable
            return io.NodeOutput(to_images(put_back(from_images(images), from_images(clip), changed)))
