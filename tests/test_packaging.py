"""What the pack says of itself: to pip, to ComfyUI's registry and in the README."""

import importlib
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import tav_core

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text()
REQUIREMENTS = [Requirement(line) for line in (ROOT / "requirements.txt").read_text().split("\n") if line]
# which the registry takes, where it takes note of none at all if one is another (specifications.mdx in Comfy-Org/docs)
SYSTEMS = ("OS Independent", "Microsoft", "POSIX", "MacOS")
DEVICES = ("GPU :: NVIDIA CUDA", "GPU :: AMD ROCm", "GPU :: Intel Arc", "GPU :: Apple Metal", "NPU :: Huawei Ascend")


@pytest.mark.parametrize("classifier", PYPROJECT["project"]["classifiers"])
def test_classifiers_are_those_of_the_registry_or_of_pypi(classifier):
    kind, *rest = classifier.split(" :: ")
    if kind == "Environment":
        assert " :: ".join(rest) in DEVICES
    else:
        assert classifier in pytest.importorskip("trove_classifiers").classifiers
        assert kind != "Operating System" or rest[0] in SYSTEMS


def test_the_comfyui_that_is_needed_is_the_one_that_is_tested():
    needed = PYPROJECT["tool"]["comfy"]["requires-comfyui"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", needed)  # the registry takes three numbers only
    assert f"ComfyUI {needed.removeprefix('>=')} or newer" in README
    assert f"a real ComfyUI {needed.removeprefix('>=')}" in (ROOT / "nodes" / "README.md").read_text()
    assert f"ComfyUI {needed.removeprefix('>=')} " in (ROOT / "tests" / "support" / "comfyui_install.py").read_text()


def test_the_python_that_is_needed():
    needed = PYPROJECT["project"]["requires-python"]
    assert f"Python {needed.removeprefix('>=')} or newer" in README
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + needed.removeprefix(">=").replace(".", "")


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_requirements_are_lowest_versions_that_were_tried(requirement):
    assert {bound.operator for bound in requirement.specifier} <= {
        ">="
    }  # nothing is held back in the user's environment
    assert version(requirement.name) in requirement.specifier


def test_extras_that_are_spoken_of_are_there():
    extras, told = PYPROJECT["project"]["optional-dependencies"], set()
    for path in [*(ROOT / "tav_core").rglob("*.py"), *(ROOT / "tav_core").rglob("*.md")]:
        told |= set(re.findall(r"comfyui-tune-a-video\[(\w+)\]", path.read_text()))
    assert {"batch", "perceptual"} == told <= extras.keys()
    assert all(Requirement(line).specifier for lines in extras.values() for line in lines)


def test_every_file_of_the_package_is_installed():
    packages, data = PYPROJECT["tool"]["setuptools"]["packages"], PYPROJECT["tool"]["setuptools"]["package-data"]
    folders = {name: ROOT.joinpath(*name.split(".")) for name in packages}
    assert {path.parent for path in (ROOT / "tav_core").rglob("__init__.py")} == set(folders.values())
    installed = {path for folder in folders.values() for path in folder.glob("*.py")}
    installed |= {
        path for name, patterns in data.items() for pattern in patterns for path in folders[name].glob(pattern)
    }
    files = [path for path in (ROOT / "tav_core").rglob("*") if path.is_file() and path.suffix not in (".md", ".pyc")]
    assert files and set(files) <= installed


def test_the_command_is_there():
    module, _, function = PYPROJECT["project"]["scripts"]["tune-a-video"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_version_stands_in_one_place():
    released = PYPROJECT["project"]["version"]
    assert tav_core.__version__ == released
    assert re.findall(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == released
    for path in (ROOT / "tav_core").rglob("*.py"):
        assert f'"{released}"' not in path.read_text(), path
    assert "version:" not in re.sub("cff-version:", "", (ROOT / "CITATION.cff").read_text())


def test_dir_shows_the_public_names():
    shown = dir(tav_core)
    assert shown == sorted([*tav_core.__all__, "__version__"])
    assert all(hasattr(tav_core, name) for name in shown)
    assert importlib.import_module("tav_core.video").load_video is tav_core.load_video
