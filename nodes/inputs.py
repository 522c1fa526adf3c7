"""What a graph gives to a node, checked before anything is computed.

The core checks what stands in a prompt, but lets through NaN, in some versions unknown choices, names with null bytes
and values in place of connections; and it checks nothing of what comes over a connection.
"""

import inspect
import re
from collections.abc import Callable
from functools import wraps
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..tav_core import TavError
from .common import inside

# inputs whose nodes know themselves what there is
FILES = ("file", "folder", "checkpoint", "controlnet", "clip_model", "lpips_model", "raft_model")
LONGEST_NAME, LONGEST_NEW, LONGEST_PATH = 255, 200, 1000  # bytes; a file that is written has a longer name before
_SHOWN = 100  # characters of a value in an error
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # on Windows, in every folder


def checked(execute: Callable) -> Callable:
    """The `execute` of a node that raises a TavError for inputs that aren't what its schema says.

    Optional ones that are None are left out.
    """
    signature = inspect.signature(execute)

    @wraps(execute)
    def run(cls, *args, **kwargs):
        given = signature.bind(cls, *args, **kwargs).arguments
        given |= given.pop("others", {})
        for each in cls.define_schema().inputs:
            if each.optional and given.get(each.id) is None:
                given.pop(each.id, None)
            elif each.id in given:
                check(each, given[each.id])
        return execute(**given)

    return run


def told(node: type[io.ComfyNode], **given: Any) -> bool | str:
    """For `validate_inputs`: what is wrong with inputs, which the core checks no more then.

    Args:
        given: None for those that come from another node, or are missing.
    """
    try:
        for each in node.define_schema().inputs:
            if given.get(each.id) is not None:
                check(each, given[each.id])
    except TavError as error:
        return str(error)
    return True


def usable(find: Callable[[str], Any], name: str | None) -> bool | str:
    """For `validate_inputs`: what a function says of a name, None as in `told`."""
    try:
        if name is not None:
            find(name)
    except TavError as error:
        return str(error)
    return True


def check(each: io.Input, value: Any):
    """Raises a TavError for a value that isn't what an input takes."""
    kind = str(each.get_io_type())
    if kind in ("INT", "FLOAT"):
        check_number(each, value, Integral if kind == "INT" else Real)
    elif kind == "STRING" or isinstance(each, io.Combo.Input):
        check_text(each.id, value)
        if kind != "STRING" and each.id not in FILES and value not in each.options:
            raise TavError(each.id, _short(value), "is unknown", f"choose one of {', '.join(each.options)}")
    elif kind != "BOOLEAN" and not _SOCKETS.get(kind, _made)(value):
        raise TavError(each.id, None, f"is no {kind} that this node can take", "connect it to a node that gives one")


def check_number(each: io.Input, value: Any, kind: type):
    if (
        isinstance(value, bool) or not isinstance(value, kind) or not each.min <= value <= each.max
    ):  # NaN is in no range
        whole = "a whole number" if kind is Integral else "a number"
        raise TavError(each.id, _short(value), "is out of range", f"give {whole} from {each.min} to {each.max}")


def check_text(field: str, value: Any):
    if not isinstance(value, str):
        raise TavError(field, _short(value), "is no text", "write one")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise TavError(field, None, "holds half of a character", "write it anew")


def check_name(field: str, name: Any, longest: int = LONGEST_NAME):
    """Raises a TavError for what can't be the name of a file, or of one in subfolders."""
    check_text(field, name)
    parts = re.split(r"[/\\]", name)
    if max(len(part.encode()) for part in parts) > longest or len(name.encode()) > LONGEST_PATH:
        raise TavError(field, None, f"is a name of {len(name.encode())} bytes", "give a shorter one")
    if not name.isprintable():
        raise TavError(field, name, "holds characters that are no letters", "give a plain name")


def check_new_name(field: str, name: Any):
    """Raises a TavError for a name under which no file should be written, on any system."""
    check_name(field, name, LONGEST_NEW)
    parts = re.split(r"[/\\]", name)
    if any(part.strip(" .") == "" for part in parts):
        raise TavError(field, name, "names no file", "give the file a name, such as my-clip")
    if any(_DEVICE.fullmatch(part.strip()) for part in parts) or re.match("[A-Za-z]:", name):
        raise TavError(field, name, "names a device or drive of Windows", "give another name")


def new_file(folder: Path, name: Any) -> Path:
    """The path of a safetensors file that is to be written in a folder, or in a subfolder that the name holds.

    Raises:
        TavError: no name, one that leads out of the folder, or under which no file should be written.
    """
    check_name("name", name)
    plain = name.strip().removesuffix(".safetensors").replace("\\", "/")
    if not plain:
        raise TavError("name", None, "is empty", "give the file a name")
    path = inside(folder, f"{plain}.safetensors", "name")
    check_new_name("name", plain)
    return path


def _short(value: Any) -> Any:
    """A value as an error shows it, and no more of it than can be read."""
    if isinstance(value, Tensor):
        return f"of shape {tuple(value.shape)}"
    text = value if isinstance(value, str) else repr(value)
    return f"{text[:_SHOWN]}..." if len(text) > _SHOWN else value


def _made(value: Any) -> bool:
    """Whether a node made it: nothing that stands in a prompt."""
    return value is not None and not isinstance(value, (str, int, float, list, dict))


def _is_conditioning(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[0], Tensor) and entry[0].ndim == 3
        and isinstance(entry[1], dict) for entry in value
    )  # fmt: skip


def _is_audio(value: Any) -> bool:
    return (
        isinstance(value, dict) and isinstance(value.get("waveform"), Tensor) and value["waveform"].ndim == 3
        and 0 not in value["waveform"].shape and isinstance(value.get("sample_rate"), int)
    )  # fmt: skip


def _is_images(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and len(value) > 0 and value.shape[-1] in (3, 4)


_SOCKETS = {
    "AUDIO": _is_audio,
    "CONDITIONING": _is_conditioning,
    "LATENT": lambda value: isinstance(value, dict) and isinstance(value.get("samples"), Tensor),
    "IMAGE": _is_images,
    "MASK": lambda value: isinstance(value, Tensor) and value.ndim == 3 and len(value) > 0,
    "SIGMAS": lambda value: isinstance(value, Tensor) and value.ndim == 1,
    "TAV_TAKES": lambda value: isinstance(value, tuple),
}
