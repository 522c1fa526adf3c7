"""Where checkpoints lie: by a path, by a name in a ComfyUI's lists, or in the cache of the Hugging Face Hub."""

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path

import yaml
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache

from .errors import TavError, field

MINI = Path(__file__).parent / "mini" / "checkpoint"
SHIPPED = {  # with the mini checkpoint, by kind and name
    ("loras", "mini-neon"): MINI.parent / "lora" / "mini-neon.safetensors",
    ("controlnet", "mini"): MINI.parent / "controlnet",
}
MINI_SIZE = 128  # pixels
MINI_KNOWS = (
    f"knows a rendered world of 6 shapes, 6 colours, 6 backgrounds and 4 styles alone, at {MINI_SIZE} x {MINI_SIZE} "
    "pixels: it is for trying things out, not for your film"
)
SD15 = (
    "Stable Diffusion 1.5, such as v1-5-pruned-emaonly-fp16.safetensors (2.1 GB, from "
    "huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive)"
)
_SUFFIXES = (".safetensors", ".ckpt")  # of the second kind the reader says what to do
_REPOSITORY = r"[\w.-]{1,96}/[\w.-]{1,96}"


def find_checkpoint(name: str | Path | None, comfyui: str | Path | None = None) -> Path:
    """The file or folder of a checkpoint. Nothing is ever downloaded.

    Args:
        name: "mini", a path, a name as ComfyUI lists it under `models/checkpoints` or `models/diffusers` (or what is
            behind its last /), or a repository of the Hugging Face Hub that is in the cache, "owner/name", also with
            the name of a file in it.
        comfyui: the folder of a ComfyUI; by default that of the environment variable COMFYUI_PATH, if there is one.

    Raises:
        TavError: no name, or none that is found; a ComfyUI that is none.
    """
    if comfyui is not None:
        _check_comfyui(Path(comfyui))
    if name is None:
        here = list(known_checkpoints(comfyui))[:3]
        told = f"; on this machine: {', '.join(here)}" if here else ""
        remedy = f'give one of {SD15}, or "mini", which {MINI_KNOWS}{told}'
        raise TavError("checkpoint", None, "is missing", remedy)
    if str(name) == "mini":
        return MINI
    if os.path.exists(name):
        return Path(name)
    known = known_checkpoints(comfyui)
    behind = [path for each, path in known.items() if each.rsplit("/", 1)[-1] == str(name)]
    found = known.get(str(name)) or (behind[0] if len(behind) == 1 else None) or _in_cache(str(name))
    if found is None:
        raise _not_found(str(name), comfyui or _of_environment(), known)
    return found


def find_model(of: str, name: str | Path, kind: str, comfyui: str | Path | None = None) -> Path:
    """The file or folder of another model than a checkpoint: a path, or its name in a ComfyUI's lists of a kind.

    Args:
        of: the field that errors are about.
        name: what is there under `models/KIND`, or what is behind its last /, with or without its suffix; also that of
            a model that ships with the mini checkpoint.
        kind: "loras", "embeddings" or "controlnet".
        comfyui: as in `find_checkpoint`.

    Raises:
        TavError: nothing of that name, or several.
    """
    if comfyui is not None:
        _check_comfyui(Path(comfyui))
    if (shipped := SHIPPED.get((kind, str(name)))) or os.path.exists(name):
        return shipped or Path(name)
    comfyui, named = comfyui or _of_environment(), []
    for root in _roots(Path(comfyui), kind) if comfyui is not None else ():
        for folder, _, files in sorted(os.walk(root, followlinks=True)):
            paths = [Path(folder), *(Path(folder, file) for file in sorted(files) if file.endswith(".safetensors"))]
            named += [(path, path.relative_to(root).as_posix()) for path in paths]

    def matching(part: Callable[[str], str]) -> list[Path]:
        found = [path for path, full in named if str(name) in (part(full), part(full).removesuffix(".safetensors"))]
        return [*{path.resolve(): path for path in found}.values()]  # two lists may have a folder in common

    found = matching(str) or matching(lambda full: full.rsplit("/", 1)[-1])
    if len(found) != 1:
        lists = f"models/{kind} of the ComfyUI in {comfyui}" if comfyui else f"a ComfyUI's lists ({field('comfyui')})"
        problem = f"is several in {lists}" if found else f"is no path that exists, and no name in {lists}"
        raise TavError(of, name, problem, "give its path")
    return found[0]


def known_checkpoints(comfyui: str | Path | None = None) -> dict[str, Path | None]:
    """Checkpoints that are here, by name; None for those of the cache, whose folder is looked up when it is needed.

    Raises:
        TavError: a ComfyUI that is none.
    """
    comfyui = comfyui or _of_environment()
    found: dict[str, Path | None] = {}
    for kind in ("checkpoints", "diffusers") if comfyui is not None else ():
        for root in _roots(Path(comfyui), kind):
            for folder, _, files in sorted(os.walk(root, followlinks=True)):
                for file in sorted(files):
                    path = Path(folder, file if kind == "checkpoints" else "")
                    if file.endswith(_SUFFIXES) if kind == "checkpoints" else file == "model_index.json":
                        found.setdefault(path.relative_to(root).as_posix(), path)
    for index in sorted(Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*/model_index.json")):
        found.setdefault(index.parts[-4].removeprefix("models--").replace("--", "/"), None)
    return found


def _roots(comfyui: Path, kind: str) -> list[Path]:
    """The folders that a ComfyUI lists models of a kind from: its own, and those of its extra_model_paths.yaml.

    Raises:
        TavError: no ComfyUI, or a file of paths that can't be read.
    """
    _check_comfyui(comfyui)
    roots, extra = [comfyui / "models" / kind], comfyui / "extra_model_paths.yaml"
    if extra.is_file():
        try:
            for section in (yaml.safe_load(extra.read_text("utf-8")) or {}).values():
                section = section or {}  # all of whose lines are commented out
                base = os.path.expandvars(os.path.expanduser(section.get("base_path", "")))
                lines = section.get(kind, "").splitlines()
                roots += [comfyui / base / line.strip() for line in lines if line.strip()]
        except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
            told = f"can't be read ({type(error).__name__})"
            raise TavError("comfyui", extra, told, "correct that file") from error
    return roots


def _check_comfyui(folder: Path):
    if not os.path.isdir(folder / "models"):
        remedy = "give the folder that its main.py and models are in"
        raise TavError("comfyui", folder, "is no ComfyUI (it has no folder models)", remedy)


def _of_environment() -> str | None:
    return os.environ.get("COMFYUI_PATH") or None


def _in_cache(name: str) -> Path | None:
    """What the cache of the Hugging Face Hub has of a repository or of a file in one."""
    if not (match := re.fullmatch(rf"({_REPOSITORY})(?:/(.+))?", name)):
        return None
    try:
        if match[2]:
            found = try_to_load_from_cache(match[1], match[2])
            return Path(found) if isinstance(found, str) else None
        return Path(snapshot_download(match[1], local_files_only=True))
    except (OSError, ValueError):  # not there, or no name of a repository
        return None


def _not_found(name: str, comfyui: str | Path | None, known: dict[str, Path | None]) -> TavError:
    plain = {each.rsplit("/", 1)[-1].lower(): each for each in known}
    wanted = name.rsplit("/", 1)[-1].lower()
    near = [*(each for short, each in plain.items() if wanted in short),
            *(plain[short] for short in difflib.get_close_matches(wanted, plain, 3, 0.5))]  # fmt: skip
    lists = f"in a ComfyUI's lists (none was named by {field('comfyui')} or COMFYUI_PATH)"
    if comfyui is not None:
        lists = f"in the lists of the ComfyUI in {comfyui}"
    problem = f"is no path that exists, and neither {lists} nor in the Hugging Face cache ({constants.HF_HUB_CACHE})"
    told = ", ".join(dict.fromkeys(near[:3]))
    return TavError("checkpoint", name, problem, f"did you mean {told}?" if told else f'give one of {SD15}, or "mini"')
