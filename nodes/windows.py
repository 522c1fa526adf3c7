"""Context Windows: a MODEL that takes clips longer than it was tuned on."""

from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ..tav_core import ContextWindows as Windows
from ..tav_core import TavError
from .common import schema
from .errors import plain_errors
from .inputs import checked
from .native import WINDOWS, video_unet, windows_of


def room_for_a_window(executor, model, noise_shape, conds, *args, **kwargs):
    """Wraps ComfyUI's preparation of a sampler, which would make room for the whole clip.

    Raises:
        TavError: boxes of GLIGEN, whose patch is for all frames at once.
    """
    if any("gligen" in cond for prompts in conds.values() for cond in prompts):
        problem = "has boxes of GLIGEN, and MODEL sees the clip in Context Windows (Tune-A-Video)"
        raise TavError("CONDITIONING", None, problem, "leave out one of the two")
    windows = windows_of(model.model_options["transformer_options"])
    shape = [min(noise_shape[0], windows.context_length), *noise_shape[1:]]
    return executor(model, shape, conds, *args, **kwargs)


class ContextWindows(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TAVContextWindows",
            display_name="Context Windows (Tune-A-Video)",
            description="For long clips: the MODEL sees them in overlapping windows, in the memory of a short one, "
                        "and draws one video without seams. Goes before One-Shot Tune, which then learns the whole "
                        "long clip, or behind the tuned MODEL.",
            search_aliases=["long video", "sliding window", "context length"],
            inputs=[
                io.Model.Input("model", tooltip="From Inflate, One-Shot Tune or Apply Tuned Weights."),
                io.Int.Input("context_length", default=0, min=0, max=1024,
                             tooltip="Frames that are looked at together, the first of the clip among them, 3 or "
                                     "more. 0: as many as the MODEL was tuned on; give a number if it isn't tuned "
                                     "yet."),
                io.Int.Input("context_overlap", default=4, min=2, max=1023,
                             tooltip="Frames that neighbouring windows share. More blends more softly and takes more "
                             "time."),
            ],
            outputs=[
                io.Model.Output(tooltip="For One-Shot Tune, DDIM Inversion and every sampler. A LATENT is one clip "
                                        "then."),
            ],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, model, context_length, context_overlap) -> io.NodeOutput:
        with plain_errors():
            video_unet(model)  # raises for a model that isn't inflated
            if context_length:
                Windows(context_length, context_overlap)  # raises for numbers that don't fit
            model = model.clone()
            options = model.model_options["transformer_options"]
            model.model_options["transformer_options"] = {**options, WINDOWS: (context_length, context_overlap)}
            model.remove_wrappers_with_key(WrappersMP.PREPARE_SAMPLING, WINDOWS)
            model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, WINDOWS, room_for_a_window)
        return io.NodeOutput(model)
