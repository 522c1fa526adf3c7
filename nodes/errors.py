"""How an error of the nodes is worded: one sentence of `tav_core.errors`, in the names that nodes have for fields."""

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management

from ..tav_core import TavError
from ..tav_core.errors import OutOfMemory, field
from ..tav_core.memory import is_out_of_memory

# fields of errors that the nodes call otherwise
_NAMES = {"video": "file", "output": "file", "tuned": "tuned_weights", "state": "state file", "device": "the device",
          "size": "width and height", "num_steps": "steps"}  # fmt: skip
# of all errors, because not all come up in our nodes: some do when a stock sampler runs one of our MODELs
TavError.name_of = staticmethod(lambda field: _NAMES.get(field, field))
TavError.assign = " "


class CoreOutOfMemory(OutOfMemory, comfy.model_management.OOM_EXCEPTION):
    """Our sentence, in which the core still sees that memory ran out: it unloads all models then."""


@contextmanager
def plain_errors(**fields: str) -> Iterator[None]:
    """Out of memory becomes one sentence with a remedy; fields of an error get the names that the node has for them.

    Args:
        fields: field to the name of the node's input, where it is another than other nodes have.
    """

    def name_of(field: str) -> str:
        return fields.get(field) or TavError.name_of(field)

    try:
        yield
    except OutOfMemory as error:
        told = CoreOutOfMemory(*error.args)
        told.name_of = name_of
        raise told from error
    except TavError as error:
        error.name_of = name_of
        raise
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if hasattr(comfy.model_management, "is_oom"):  # newer cores; it also clears what CUDA would raise later
            comfy.model_management.is_oom(error)
        raise CoreOutOfMemory(
            "device",
            None,
            "ran out of memory",
            f"use fewer or smaller frames, Context Windows (Tune-A-Video), {field('memory')} low, or "
            f"{field('dtype')} bf16",
        ) from error
