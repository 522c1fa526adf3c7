"""DDIM sampling beside the walk of the source clip."""

from tav_core.ddim import ddim_sample
from tav_core.injection import EditPlaces, SourceWalk


def led_sample(*args, attention_injection=0.0, changeable=None, anchor=None, still=None, moving=None, **settings):
    """`ddim_sample`, with a `SourceWalk` of that share and those places where there is any."""
    if attention_injection == 0 and changeable is anchor is still is moving is None:
        settings.pop("source_hidden_states", None)
        return ddim_sample(*args, **settings)
    walk = SourceWalk(attention_injection, EditPlaces(changeable, anchor, still, moving))
    return ddim_sample(*args, source_walk=walk, **settings)
