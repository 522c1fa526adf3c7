"""Take: another clip with its sentence, for One-Shot Tune to learn from as well."""

from comfy_api.latest import io

from .common import NodeTakes, schema
from .inputs import checked


class Take(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TAVTake",
            display_name="Take (Tune-A-Video)",
            description="Another clip with its own sentence, so that One-Shot Tune learns a motion from several "
                        "takes. A chain of these nodes holds as many as you like.",
            search_aliases=["several clips", "more clips", "data set"],
            inputs=[
                io.Latent.Input("latent", tooltip="The clip, from VAE Encode. Its size and length may be its own."),
                io.Conditioning.Input("positive",
                                      tooltip="One sentence that describes this clip, from CLIP Text Encode."),
                NodeTakes.Input("takes", optional=True, tooltip="From another Take."),
            ],
            outputs=[NodeTakes.Output(display_name="takes", tooltip="For One-Shot Tune, or another Take.")],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, latent, positive, takes=()) -> io.NodeOutput:
        return io.NodeOutput((*takes, (latent, positive)))
