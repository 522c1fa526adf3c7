"""Reading the package's own safetensors files: each is of a kind, and whole, or refused in one line."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import TavError


class Damaged(Exception):
    """What is wrong with a file that is being read."""


@contextmanager
def reading(path: str | Path, field: str, kind: str | Sequence[str], holds: str, remedy: str) -> Iterator[Any]:
    """A file of safetensors that says in its metadata that it is of a kind, its `format`.

    Args:
        field: of the errors.
        kind: or several, any of which will do.
        holds: what such files hold, in words.
        remedy: what to do with another file.

    Raises:
        TavError: no file, another kind of file, or whatever goes wrong while its content is taken apart.
    """
    path = Path(path)
    if not path.is_file():  # a folder, or a pipe, in which a reader would wait for ever
        raise TavError(field, path, "is no file" if path.exists() else "does not exist", remedy)
    try:
        with safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get("format")
            if found not in ([kind] if isinstance(kind, str) else kind):
                raise TavError(field, path, f"holds no {holds} (its format is {found!r})", remedy)
            yield file
    except TavError:
        raise
    except (OSError, SafetensorError) as error:
        raise TavError(field, path, f"can't be read ({error})", remedy) from error
    except KeyError as error:
        raise TavError(field, path, f"is damaged (it lacks {error})", remedy) from error
    except (Damaged, ValueError, TypeError, RecursionError) as error:
        raise TavError(field, path, f"is damaged ({error})", remedy) from error


def parsed(metadata: Mapping[str, str], kinds: Mapping[str, type]) -> dict[str, Any]:
    """Metadata that is JSON, by name, each of its type.

    Raises:
        KeyError, ValueError, RecursionError, Damaged: what `reading` makes an error of.
    """
    values = {name: json.loads(metadata[name]) for name in kinds}
    for name, kind in kinds.items():
        if type(values[name]) is not kind:
            raise Damaged(f"{name} is {str(values[name])[:40]!r}")
    return values


def check_finite(tensors: Mapping[str, Tensor]):
    """Raises `Damaged` for a tensor that isn't of finite floating-point numbers."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise Damaged(f"{name} holds what is no finite number")
