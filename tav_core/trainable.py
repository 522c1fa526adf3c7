"""What is tuned (Tune-A-Video, arXiv 2212.11565, section 3.3): queries of the old attentions, and the temporal one."""

import re

from torch import nn

_TRAINABLE = re.compile(r"\.(attn1\.to_q|attn2\.to_q|attn_temp)\.")


def trainable_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """What the method tunes (Tune-A-Video, section 3.3), by name: in every transformer block the query projections of
    self- and cross-attention, `attn1.to_q` and `attn2.to_q`, and all of the temporal attention, `attn_temp`, but not
    its norm. Of Stable Diffusion 1.5, 74 of 909 million parameters.

    Args:
        unet: a `VideoUNet`; of a 2D one there are only the queries.

    Returns: the parameters themselves, as `named_parameters` calls them, in its order: what is done to them in place is
        done to the U-Net.
    """
    return {name: parameter for name, parameter in unet.named_parameters() if is_tuned(name)}


def is_tuned(name: str) -> bool:
    """Whether the method tunes a parameter of that name."""
    return bool(_TRAINABLE.search(name))
