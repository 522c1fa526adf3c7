"""What is tuned (Tune-A-Video, arXiv 2212.11565, section 3.3): queries of the old attentions, and the temporal one."""

import re

from torch import nn

_TRAINABLE = re.compile(r"\.(attn1\.to_q|attn2\.to_q|attn_temp)\.")


def trainable_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter of what the method tunes: `attn1.to_q`, `attn2.to_q` and all of `attn_temp`."""
    return {name: parameter for name, parameter in unet.named_parameters() if is_tuned(name)}


def is_tuned(name: str) -> bool:
    """Whether the method tunes a parameter of that name."""
    return bool(_TRAINABLE.search(name))
