"""Exceptions of the package, which every front end tells in its own words."""

import re
from collections.abc import Callable
from os import PathLike
from typing import Any

# fields that a function of Python calls otherwise
_PYTHON = {"video": "path", "output": "path", "checkpoint": "name_or_path", "controlnet": "path", "tuned": "path",
           "noise": "path", "state": "state_path", "size": "width and height",
           "edit": "prompt", "contrast": "contrasts", "lora": "path", "lora_strength": "strength", "embedding": "path",
           "edit_lora": "loras", "control_strength": "strength", "control_start": "start",
           "control_end": "end"}  # fmt: skip
_LONG_WORD = re.compile(r"\S{301,}")
_MENTIONED = re.compile("\ue000(.*?)\ue001")  # characters of the private use area: no file name or sentence has them


_LONGEST = 300  # characters of a value, or of a word, in an error


def shortened(text: str, most: int = _LONGEST) -> str:
    """Text without its middle, if it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]}...{text[-most // 6 :]}"


def escaped(text: str) -> str:
    """Text on one line, which a terminal shows and doesn't obey: \\n for a line break, \\x1b for an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def field(name: str) -> str:
    """Mentions another field in what a `TavError` says: front ends put their own name for it there."""
    return f"\ue000{name}\ue001"


class TavError(ValueError):
    """A mistake that the user can fix, in its parts. As a string it is one line, "field=value problem; remedy".

    Attributes:
        field: what is at fault, an argument of a Python function, an option or an input of a node.
        value: what was given, or None where the problem says it.
        problem: what is wrong, the rest of a sentence that begins with the field.
        remedy: what to do, in the imperative.
        name_of: the front end's name for a field. A front end sets it, for all errors or for one that it catches.
        assign: what the front end writes between a field and its value.
    """

    name_of: Callable[[str], str] = staticmethod(lambda field: _PYTHON.get(field, field))
    assign: str = "="

    def __init__(self, field: str, value: Any, problem: str, remedy: str):
        super().__init__(field, value, problem, remedy)
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy

    def __str__(self) -> str:
        value = "" if self.value is None else self.assign + self._value()
        told = f"{field(self.field)}{value} {self.problem}; {self.remedy}"
        told = _MENTIONED.sub(lambda mentioned: self.name_of(mentioned[1]), told)
        return escaped(_LONG_WORD.sub(lambda word: shortened(word[0]), told))

    def _value(self) -> str:
        value = str(self.value) if isinstance(self.value, PathLike) else self.value
        try:
            text = str(value)
        except ValueError:  # an integer of more digits than Python turns into text
            value = text = hex(value)
        if len(text) > _LONGEST:
            value = text = shortened(text)
        # nothing, a line break or a blank at an end would not be seen
        plain = self.assign != "=" and text and text == text.strip() and text.isprintable()
        return text if plain else repr(value)


class OutOfMemory(TavError):
    """A step that doesn't fit into memory."""


class Cancelled(Exception):
    """Raised by a callback to stop a running step; whatever was computed so far has been kept."""
