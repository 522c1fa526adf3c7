"""The file of --config: options of a command from YAML, JSON or the summary of an edit."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import yaml

from .errors import TavError, shortened


def with_config(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """The arguments of a command with those of its --config before them, but for options that they have themselves.

    Raises:
        TavError: a file that can't be read, or something in it that is no option of the command.
    """
    known = parser._option_string_actions
    finder = argparse.ArgumentParser(add_help=False)
    finder.add_argument("--config", nargs="?")
    if "--config" not in known or (path := finder.parse_known_args(argv)[0].config) is None:
        return argv
    words = {word.split("=", 1)[0] for word in argv if word.startswith("--") and len(word) > 2}
    given = {id(action) for option, action in known.items() for word in words
             if option == word or (word not in known and option.startswith(word))}  # fmt: skip
    more = []
    for name, value in _read(Path(path)).items():
        action = known.get(f"--{str(name).replace('_', '-')}")
        if action is None or action.dest in ("config", "help"):
            told = f"has {shortened(str(name), 120)!r}, which is no option of {parser.prog.rsplit(' ', 1)[-1]}"
            raise TavError("config", path, told, "leave it out")
        if id(action) not in given:
            more += _as_arguments(path, name, value, action)
    return [*more, *argv]


def _read(path: Path) -> dict[str, Any]:
    """The options in a file of YAML or JSON, or in a summary."""
    if not os.path.isfile(path):
        raise TavError("config", path, "is no file", "give a summary.json of `edit`, or a file of options")
    try:
        text = path.read_text("utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        if isinstance(content, dict) and "run" in content:
            content = content["run"]["options"]
        if isinstance(content, dict):
            return content
    except (OSError, ValueError, TypeError, KeyError, RecursionError, yaml.YAMLError) as error:
        raise TavError("config", path, f"can't be read ({type(error).__name__})", "give what `edit` wrote") from error
    raise TavError("config", path, "holds no options", "give a summary.json of `edit`, or options with their values")


def _as_arguments(path: str, name: str, value: Any, action: argparse.Action) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    values = value if isinstance(value, list) else [value]
    if value is None or (value is False and action.nargs == 0 and f"--no-{name}" not in action.option_strings):
        return []
    if any(not isinstance(each, (str, int, float)) for each in values):
        raise TavError("config", path, f"has {option[2:]} with a value that is none", "give text, a number or a list")
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise TavError("config", path, f"has {option[2:]} with {value!r}", "give true or false")
        return [option if value else f"--no-{name}"]
    if action.nargs == "+":
        return [option, *map(str, values)]
    return [f"{option}={each}" for each in values]
