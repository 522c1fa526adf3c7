"""A made-up folder of the layout of LOVEU-TGVE 2023."""

import csv
from pathlib import Path

from PIL import Image

from tav_core.mini import world

_CAPTIONS = [f"{kind} Caption" for kind in ("Style Change", "Object Change", "Background Change", "Multiple Changes")]
_SENTENCE = "a red ball is sliding on the grass"
_EDITS = ["a red ball is sliding on the grass, cartoon", "a red star is sliding on the grass",
          "a red ball is sliding on the sand", "a blue star is sliding on the snow"]  # fmt: skip
_EMPTY = [""] * 7
# as in the published table: a row opens each set, an empty one ends it
TGVE_ROWS = [
    ["Video name", "Our GT caption", *_CAPTIONS, "Source"],
    ["DAVIS Videos:", *_EMPTY[1:]],
    ["stunt", f"{_SENTENCE} ", *_EDITS, "DAVIS"],
    _EMPTY,
    ["Youtube Videos:", *_EMPTY[1:]],
    ["salsa", _SENTENCE, *_EDITS, "YouTube"],
    _EMPTY,
    ["Videvo Videos:", *_EMPTY[1:]],
    ["lotus", _SENTENCE, *_EDITS, "Videvo"],
]


def make_tgve(folder: Path, frames: int = 2, size: int = 32) -> Path:
    """Its three sets with a clip each."""
    drawn = world.render_clip(world.clip_scenes(world.Scene(), "slide", frames), size)
    for name in ("DAVIS_480p/480p_frames/stunt", "youtube_480p/480p_frames/salsa", "videvo_480p/480p_frames/lotus"):
        (folder / name).mkdir(parents=True)
        for number, frame in enumerate(drawn):
            Image.fromarray(frame).save(folder / name / f"{number:05}.jpg")
    write_table(folder, TGVE_ROWS)
    return folder


def write_table(folder: Path, rows: list[list[str]]):
    with open(folder / "LOVEU-TGVE-2023_Dataset.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
