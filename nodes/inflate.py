"""Inflate: a native image MODEL becomes a native video MODEL."""

from comfy_api.latest import io

from ..tav_core.attention import MODES
from ..tav_core.inflation import NORMS
from .common import schema
from .errors import plain_errors
from .inputs import checked, told
from .native import inflate_model


class Inflate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TAVInflate",
            display_name="Inflate (Tune-A-Video)",
            description="Turns a Stable Diffusion 1.x, 2.x or SDXL MODEL into one that sees all frames of a LATENT "
                        "batch as one video. LoRAs connected before it are baked in. Until it is tuned it draws "
                        "almost what the image model draws.",
            search_aliases=["video model", "sparse-causal attention", "temporal attention"],
            advanced=("temporal_causal", "norm"),
            inputs=[
                io.Model.Input("model", tooltip="From Load Checkpoint, the stock one or ours, with LoRAs if you like."),
                io.Combo.Input("attention", options=list(MODES), default="sparse-causal",
                               tooltip="Frames that each frame looks at: the first and the previous one "
                                       "(sparse-causal, as in the paper), the first alone, or all of them (full: "
                                       "slow, most consistent)."),
                io.Boolean.Input("temporal_causal", default=False,
                                 tooltip="Frames see only earlier ones in temporal attention. The paper: off."),
                io.Combo.Input("norm", options=list(NORMS), default="video",
                               tooltip="Statistics of the group norms over the whole video, as in the reference code, "
                                       "or over each frame."),
            ],
            outputs=[io.Model.Output(tooltip="For One-Shot Tune, DDIM Inversion and every sampler.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, attention=None, norm=None) -> bool | str:
        return told(cls, attention=attention, norm=norm)

    @classmethod
    @checked
    def execute(cls, model, attention, temporal_causal, norm) -> io.NodeOutput:
        with plain_errors():
            return io.NodeOutput(inflate_model(model, attention=attention, temporal_causal=temporal_causal, norm=norm))
