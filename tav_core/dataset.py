"""Lists of clips with their edits: LOVEU-TGVE 2023 as it is unpacked, or a YAML file of one's own.

What is read is plain data. What is wrong with it is told all at once, before anything is done with it.
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .clip_metrics import TGVE_SIZE
from .errors import TavError
from .injection import REGIONS
from .limits import check
from .pictures import pictures
from .sampling import Edit

TGVE, OWN = "LOVEU-TGVE-2023_Dataset.csv", "clips.yaml"  # the file that tells which kind of dataset a folder is
_NAME, _PROMPT = "Video name", "Our GT caption"
_CAPTIONS = {
    "style": "Style Change Caption",
    "object": "Object Change Caption",
    "background": "Background Change Caption",
    "multiple": "Multiple Changes Caption",
}
_SETS = {"davis": "DAVIS_480p", "youtube": "youtube_480p", "videvo": "videvo_480p"}  # by the first word of a section

# keys of a clip in YAML: texts, and numbers by the limits that they keep
_TEXTS = ("video", "prompt", "name", "subject", "mask", "negative_prompt")
_NUMBERS = {"start": "start", "stride": "stride", "frames": "count", "softness": "softness"}
_KEYS = (*_TEXTS, *_NUMBERS, "edits", "region", "contrast", "settings")
SEVERAL = ("betas", "keep")  # settings of a tuning that are no single number or name
_WORDS = {"word": "subject", "count": "frames", "edit": "edits", "num_steps": "sampling_steps"}  # fields as keys
_FOLDER = re.compile(r"\w([\w .+()-]{0,98}[\w+()-])?")  # names that every file system takes


@dataclass(frozen=True)
class Entry:
    """A clip of a dataset, and how it is to be edited.

    Attributes:
        name: of its folder in what is written, such as "DAVIS_480p/stunt".
        prompt: one sentence that describes the clip.
        edits: by their kind, such as "style".
        contrasts, word, mask: what tells where the subject is (see `EditJob`); the mask as a file or folder.
        softness: of the mask's edge, in pixels; None as usual.
        start, stride, count: which frames; None where the dataset doesn't say it.
        settings: of the preset, which are other ones for this clip.
    """

    name: str
    video: Path
    prompt: str
    edits: dict[str, Edit]
    contrasts: tuple[str, ...] = ()
    word: str = ""
    mask: Path | None = None
    softness: int | None = None
    negative_prompt: str = ""
    start: int = 0
    stride: int | None = None
    count: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """What was read.

    Attributes:
        faults: what is wrong, a sentence each; `entries` lacks the clips that have one.
        size: pixels a side that the dataset's own protocol works at, or None.
        count: frames of clips that don't say how many; None for all.
    """

    entries: list[Entry]
    faults: list[str]
    size: int | None
    count: int | None


def read_dataset(path: Path, count: int) -> Dataset:
    """Reads a list of clips; the clips themselves are not looked at.

    Args:
        path: the folder into which LOVEU-TGVE 2023 was unpacked; or a YAML file, or a folder that holds it as
            clips.yaml.
        count: frames of the clips of a YAML file that doesn't say how many.

    Raises:
        TavError: there is nothing of both, or nothing that can be read.
    """
    if path.is_dir():
        if (path / TGVE).is_file():
            return Dataset(*_read_tgve(path), TGVE_SIZE, None)
        if not (path / OWN).is_file():
            problem = f"holds neither {TGVE} nor {OWN}"
            raise TavError("dataset", path, problem, "give the folder of LOVEU-TGVE 2023, or of a list of yours")
        path = path / OWN
    if not path.is_file() or path.suffix.lower() not in (".yaml", ".yml"):
        problem = "is neither a folder nor a YAML file" if path.exists() else "does not exist"
        raise TavError("dataset", path, problem, "give the folder of LOVEU-TGVE 2023, or a .yaml file")
    return Dataset(*_read_own(path), None, count)


def in_words(error: TavError) -> str:
    """An error in the words of a dataset: of a clip in a list it is the keys that a reader knows."""
    error.name_of, error.assign = lambda name: _WORDS.get(name, name), " "
    return str(error)


def video_fault(video: Path) -> str | None:
    """What is wrong with a clip at first sight."""
    if not os.path.exists(video):  # which minds no name that is none
        return f"video {video} does not exist; check where it is"
    try:
        empty = video.is_dir() and not pictures(video)
    except OSError as error:
        return f"video {video} can't be read ({error.strerror}); check its permissions"
    if empty:
        return f"video {video} is a folder without images; put its frames there"
    return None if video.is_dir() or video.is_file() else f"video {video} is neither a file nor a folder; give one"


def chosen(entries: Sequence[Entry], names: Sequence[str] | None, kinds: Sequence[str] | None) -> list[Entry]:
    """The entries of some names, with the edits of some kinds.

    Args:
        names: of entries, whole ("DAVIS_480p/stunt"), their last part or that of their set; None for all.

    Raises:
        TavError: a name or a kind that no entry has.
    """
    told = [{entry.name, *entry.name.split("/")} for entry in entries]
    _check_known("only", names or (), set().union(*told))
    _check_known("kinds", kinds or (), {kind for entry in entries for kind in entry.edits})
    of_name = [entry for entry, own in zip(entries, told) if names is None or own & set(names)]
    edits = [{kind: edit for kind, edit in entry.edits.items() if kinds is None or kind in kinds} for entry in of_name]
    return [Entry(**(vars(entry) | {"edits": own})) for entry, own in zip(of_name, edits) if own]


def _check_known(of: str, wanted: Sequence[str], known: set[str]):
    for name in wanted:
        if name not in known:
            few = ", ".join(sorted(known)[:12]) + (" ..." if len(known) > 12 else "")
            raise TavError(of, name, "is not in the dataset", f"choose among {few}")


# ------------------------------------------------------------------------------------------------ LOVEU-TGVE 2023


def _read_tgve(folder: Path) -> tuple[list[Entry], list[str]]:
    """Its table has a row that opens each of its three sets ("DAVIS Videos:"), and empty ones between them."""
    try:
        with open(folder / TGVE, newline="", encoding="utf-8-sig") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise unreadable(folder / TGVE, "a table", error) from error
    header = rows[0] if rows else []
    if lacking := [name for name in (_NAME, _PROMPT, *_CAPTIONS.values()) if name not in header]:
        problem = f"lacks the columns {', '.join(lacking)}"
        raise TavError("dataset", folder / TGVE, problem, "unpack it as it was published")
    entries, faults, in_set = [], [], None
    for line, row in enumerate(rows[1:], 2):
        cells = dict(zip(header, row)) | {name: "" for name in header[len(row) :]}
        name, where = cells[_NAME], f"{TGVE}, row {line}"
        if not any(row):
            continue
        if name.lower().endswith("videos:"):
            in_set = _SETS.get(name.lower().split()[0])
            faults += [] if in_set else [f"{where}: {name} is no set of it; there are {', '.join(_SETS.values())}"]
            continue
        told = [f"lacks its {column}" for column in (_PROMPT, *_CAPTIONS.values()) if not cells[column]]
        told += [] if _FOLDER.fullmatch(name) else [f"has no name of a folder ({name})"]
        told += [] if in_set else ["is in none of the sets"]
        faults += [f"{where}: {each}" for each in told]
        if not told:
            edits = {kind: Edit(cells[column]) for kind, column in _CAPTIONS.items()}
            video = folder / in_set / "480p_frames" / name
            entries.append(Entry(f"{in_set}/{name}", video, cells[_PROMPT], edits))
    return _unique(entries, faults, TGVE)


def unreadable(path: Path, kind: str, error: Exception) -> TavError:
    told = " ".join(str(error).split())
    return TavError("dataset", path, f"can't be read as {kind} ({told})", "repair it")


def _unique(entries: list[Entry], faults: list[str], where: str) -> tuple[list[Entry], list[str]]:
    """Names that differ in case alone are one folder on some systems."""
    twice = [name for name, number in Counter(entry.name.lower() for entry in entries).items() if number > 1]
    faults = faults + [f"{where}: {name} is there more than once; give each a name of its own" for name in twice]
    return entries, faults if entries or faults else [f"{where}: there is no clip in it"]


# ------------------------------------------------------------------------------------------------------ YAML


class _Loader(yaml.SafeLoader):
    """Plain data alone, and no key twice: YAML would drop one of them without a word."""

    def __init__(self, stream):
        super().__init__(stream)
        self.merged = set()  # mappings that have had keys of others added

    def flatten_mapping(self, node: yaml.MappingNode):
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<")
        if node not in self.merged and (twice := [key for key, number in keys.items() if number > 1]):
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is there twice", node.start_mark)
        self.merged.add(node)
        super().flatten_mapping(node)


def _read_own(path: Path) -> tuple[list[Entry], list[str]]:
    clips = read_yaml(path)
    if not isinstance(clips, list):
        remedy = "begin each clip with a dash, and give it video, prompt and edits"
        raise TavError("dataset", path, "is no list of clips", remedy)
    return read_clips(clips, path)


def read_yaml(path: Path) -> Any:
    """Plain data from a YAML file.

    Raises:
        TavError: it can't be read as such.
    """
    try:
        return yaml.load(path.read_text("utf-8-sig"), _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        told = ValueError(f"{place}{getattr(error, 'problem', None) or error}")
        raise unreadable(path, "YAML", told) from error
    except Exception as error:  # what makes numbers and dates of texts fails in every way
        raise unreadable(path, "YAML", error) from error


def read_clips(clips: Sequence[Any], path: Path) -> tuple[list[Entry], list[str]]:
    """The clips of a list that stands in a file, beside which their videos are; and what is wrong with it."""
    entries, faults = [], []
    for number, clip in enumerate(clips, 1):
        entry, told = _read_clip(clip, path.parent)
        named = f" ({clip.get('name') or clip.get('video')})" if isinstance(clip, dict) else ""
        faults += [f"{path.name}, clip {number}{named if len(named) < 80 else ''}: {each}" for each in told]
        entries += [] if told else [entry]
    return _unique(entries, faults, path.name)


def _read_clip(clip: Any, base: Path) -> tuple[Entry | None, list[str]]:
    """A clip of a YAML file, or all that is wrong with it."""
    if not isinstance(clip, dict):
        return None, [f"is {_kind(clip)}; give it video, prompt and edits"]
    if faults := [*_faults_of_keys(clip), *_faults_of_edits(clip)]:
        return None, faults
    given = {key: value for key, value in clip.items() if value is not None}
    regions, contrast = given.get("region", "everything"), given.get("contrast", ())
    of_kind = regions if isinstance(regions, dict) else dict.fromkeys(given["edits"], regions)
    name = given.get("name", Path(given["video"]).stem)
    if not _is_name(name):
        return None, [f"name {name!r} is none of a folder; give another one"]
    return Entry(
        name=name,
        video=base / given["video"],
        prompt=given["prompt"],
        edits={kind: Edit(text, of_kind.get(kind, "everything")) for kind, text in given["edits"].items()},
        contrasts=(contrast,) if isinstance(contrast, str) else tuple(contrast),
        word=given.get("subject", ""),
        mask=base / given["mask"] if "mask" in given else None,
        softness=given.get("softness"),
        negative_prompt=given.get("negative_prompt", ""),
        start=given.get("start", 0),
        stride=given.get("stride"),
        count=given.get("frames"),
        settings={key: _number(value) for key, value in given.get("settings", {}).items()},
    ), []


def _faults_of_keys(clip: dict) -> Iterator[str]:
    yield from (f"{key} is no key of a clip; choose among {', '.join(_KEYS)}" for key in clip if key not in _KEYS)
    yield from (f"{key} is missing; give it" for key in ("video", "prompt", "edits") if clip.get(key) is None)
    for key, value in clip.items():
        if value is None or key not in _KEYS:
            continue
        if key in _TEXTS:
            yield from _no_text(key, value)
        elif key == "contrast":
            for each in value if isinstance(value, list) else [value]:
                yield from _no_text(key, each)
        elif key in _NUMBERS:
            try:
                check(**{_NUMBERS[key]: value})
            except TavError as error:
                yield in_words(error)
        elif not isinstance(value, dict) and not (key == "region" and isinstance(value, str)):
            yield f"{key} is {_kind(value)}; give keys with values"
        elif key == "settings":
            for name, setting in value.items():
                if not isinstance(name, str) or not isinstance(setting, (str, int, float)):
                    yield f"settings {name} is {_kind(setting)}; give it as one number or name"
                elif name in SEVERAL:
                    yield f"settings {name} has several values, which can't be given here; leave it out"


def _faults_of_edits(clip: dict) -> Iterator[str]:
    edits, regions = clip.get("edits"), clip.get("region")
    if not isinstance(edits, dict):
        return
    if not edits:
        yield "edits are none; give one or more, each a kind with its sentence"
    for kind, sentence in edits.items():
        if not _is_name(kind):
            yield f"edits {kind!r} is no name of a kind of edit; choose another one"
        yield from _no_text(f"edits {kind}", sentence)
    for kind, region in regions.items() if isinstance(regions, dict) else [("", regions)] * isinstance(regions, str):
        if region not in REGIONS:
            yield f"region {kind} {region!r} is unknown; choose one of {', '.join(REGIONS)}"
        elif kind and kind not in edits:
            yield f"region {kind} is of no edit; leave it out"


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and bool(_FOLDER.fullmatch(name)) and name.lower() != "all"  # which the means have


def _no_text(key: str, value: Any) -> list[str]:
    return [] if isinstance(value, str) else [f"{key} is {_kind(value)}; give it as text, in quotes"]


def _kind(value: Any) -> str:
    kinds = {dict: "keys with values", list: "a list", str: "text", bool: "yes or no", int: "a number"}
    return "empty" if value is None else kinds.get(type(value), f"no text ({type(value).__name__})")


def _number(value: Any) -> Any:
    """YAML 1.1 takes 3e-5 for text."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[0-9.]*[0-9]e[+-]?[0-9]+", value, re.I) else value
