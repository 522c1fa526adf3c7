"""The user's folders, in which anything may lie: lists of choices are made of what can be used, and never fail.

What can't be read (a folder of another user, a link to nothing or to itself) or isn't what its name promises (a pipe, a
folder called config.json) is passed over, as is a name that no workflow could hold.
"""

import json
import logging
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_FOLDERS = 10_000  # that are looked into; more are a link to a whole disk
LONGEST_CONFIG = 1 << 20  # bytes


def listed(folder: str | Path) -> tuple[list[str], list[str]]:
    """Sorted names of the files and of the folders in a folder, through links."""
    files, folders = [], []
    try:
        for entry in os.scandir(folder):
            if _told(entry.name) and (kept := _kind(entry, files, folders)) is not None:
                kept.append(entry.name)
    except OSError:
        pass
    return sorted(files), sorted(folders)


def _told(name: str) -> bool:
    """Whether a name is one in Unicode: Python has others, of undecodable bytes, which no JSON holds."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _kind(entry: os.DirEntry, files: list, folders: list) -> list | None:
    try:
        return files if entry.is_file() else folders if entry.is_dir() else None
    except OSError:
        return None


def walked(root: str | Path) -> Iterator[tuple[Path, list[str]]]:
    """Each folder from `root` on with the names of its files, those near to it first.

    Links are followed, but to no folder that they lie in.
    """
    waiting, looked_into = deque([(Path(root), frozenset())]), 0
    while waiting:
        folder, above = waiting.popleft()
        real = os.path.realpath(folder)
        if real in above:
            continue
        if looked_into == MOST_FOLDERS:
            logging.warning(f"Tune-A-Video: {root} holds more than {MOST_FOLDERS} folders; the deepest are left out")
            return
        looked_into += 1
        files, folders = listed(folder)
        yield folder, files
        waiting += ((folder / name, above | {real}) for name in folders if name != ".git")


def found(roots: list[str], file: str) -> Iterator[tuple[str, Path]]:
    """The folders that hold a file, by their names from their root on."""
    for root in roots:
        for folder, files in walked(root):
            if file in files:
                yield os.path.relpath(folder, root), folder


def files_in(roots: list[str], *suffixes: str) -> dict[str, Path]:
    """The files that end so, by their names from their root on, sorted; of two of a name the one of the first root."""
    files = {}
    for root in roots:
        for folder, names in walked(root):
            paths = [folder / name for name in names if name.lower().endswith(suffixes)]
            files = {**{os.path.relpath(path, root): path for path in paths}, **files}
    return dict(sorted(files.items()))


def read_config(path: Path) -> dict[str, Any]:
    """A JSON file, or nothing if it holds no such object."""
    try:
        if not path.is_file() or path.stat().st_size > LONGEST_CONFIG:
            return {}
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
