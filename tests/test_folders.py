"""What may lie in the user's folders: the pack is imported all the same, and lists what can be used."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from tav_core.checkpoint import MINI, MINI_CONTROLNET

NET = json.dumps({"_class_name": "ControlNetModel"})


@pytest.fixture
def home(pack, tmp_path, monkeypatch):
    """Empty folders of a user, and a minute to look through them, which takes a second where nothing is busy."""
    import folder_paths

    (tmp_path / "input").mkdir()
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path / "input"))
    for kind in ("diffusers", "controlnet", "tune_a_video"):
        (tmp_path / kind).mkdir()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], {".safetensors"}))
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(60)
    yield tmp_path
    signal.alarm(0)


def choices(pack):
    """What each of the four lists offers of the user's own, and that the schemas come from it."""
    nodes, own = pack.nodes, []
    for module, node in (
        (nodes.load_video, nodes.LoadVideo), (nodes.load_checkpoint, nodes.LoadCheckpoint),
        (nodes.load_controlnet, nodes.LoadControlNet), (nodes.tuned_weights, nodes.LoadTunedWeights),
    ):  # fmt: skip
        listed = list(module.choices())
        assert node.define_schema().inputs[0].options == listed
        own += [name for name in listed if name not in ("mini", *nodes.load_video.SHIPPED)]
    return own


def make(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def closed(monkeypatch, folder):
    """A folder that may not be read; root, who may run the tests, could."""
    inner = os.scandir

    def scandir(path):
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return inner(path)

    monkeypatch.setattr(os, "scandir", scandir)


def test_nothing_is_there(pack, home):
    assert choices(pack) == []
    for name in ("input", "diffusers", "controlnet", "tune_a_video"):
        (home / name).rmdir()
    assert choices(pack) == []
    (home / "input").write_text("a file")
    assert choices(pack) == []


def test_what_can_be_used_is_listed(pack, home):
    make(home / "input", clip__mp4="", note__txt="", __hidden__mp4="")
    make(home / "input/frames", a__PNG="")
    make(home / "input/notes", a__txt="")
    make(home / "diffusers/someone/model", model_index__json="{}")
    make(home / "diffusers/net", config__json=NET)
    make(home / "controlnet/net", config__json=NET)
    make(home / "controlnet/unet", config__json=NET.replace("Control", "Other"))
    make(home / "tune_a_video/clips", ball__safetensors="", ball__txt="")
    ball = os.path.join("clips", "ball.safetensors")
    assert choices(pack) == ["clip.mp4", "frames", os.path.join("someone", "model"), "net", ball]
    assert pack.nodes.load_controlnet.choices() == {"mini": MINI_CONTROLNET, "net": home / "controlnet/net"}
    assert pack.nodes.load_checkpoint.choices()["mini"] == MINI


@pytest.mark.parametrize("target", ["itself", "nothing", "pipe"])
def test_entries_that_are_no_files(pack, home, target):
    def odd(path):
        if target == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(path.name if target == "itself" else "/nowhere")

    for path in (home / "input/odd.mp4", make(home / "input/frames") / "odd.png", home / "diffusers/odd",
                 make(home / "diffusers/a") / "model_index.json", make(home / "controlnet/a") / "config.json",
                 home / "tune_a_video/odd.safetensors"):  # fmt: skip
        odd(path)
    make(home / "input", clip__mp4="")
    make(home / "controlnet/net", config__json=NET)
    assert choices(pack) == ["clip.mp4", "net"]


@pytest.mark.parametrize("config", [
    "[" * 100_000, '{"a":' * 100_000, "[]", "null", "", "9" * 5000, b"\xff\xfe\x00", '{"_class_name": ["x"]}',
    " " * (1 << 20) + NET,
])  # fmt: skip
def test_configurations_that_say_nothing(pack, home, config):
    (make(home / "controlnet/odd") / "config.json").write_bytes(
        config if isinstance(config, bytes) else config.encode()
    )
    make(home / "controlnet/net", config__json=NET)
    assert choices(pack) == ["net"]


@pytest.mark.parametrize("name", ["input", "input/lost+found", "diffusers/a", "controlnet/a"])
def test_folders_that_may_not_be_read(pack, home, monkeypatch, name):
    make(home / "controlnet/net", config__json=NET)
    closed(monkeypatch, make(home / name))
    assert choices(pack) == ["net"]


def test_configurations_that_may_not_be_read(pack, home, monkeypatch):
    make(home / "controlnet/net", config__json=NET)
    path, inner = make(home / "controlnet/odd", config__json=NET) / "config.json", Path.read_text

    def read_text(self, *args):
        if self == path:
            raise PermissionError
        return inner(self, *args)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert choices(pack) == ["net"]


def test_names_that_no_workflow_could_hold(pack, home):
    try:
        (home / "input" / os.fsdecode(b"\xff.mp4")).write_text("")
    except OSError:
        pytest.skip("this file system has no such names")
    make(home / "controlnet" / os.fsdecode(b"\xff"), config__json=NET)
    assert choices(pack) == []


def test_folders_linked_in_a_circle(pack, home):
    for kind, file in (
        ("diffusers", "model_index.json"),
        ("controlnet", "config.json"),
        ("tune_a_video", "a.safetensors"),
    ):
        first, second = make(home / kind / "first"), make(home / kind / "second")
        (first / file).write_text(NET)
        for folder in (home / kind, first, second):
            for link, target in (("up", home / kind), ("here", folder), ("other", second), ("one", first)):
                (folder / link).symlink_to(target)
    names = choices(pack)
    assert {"first", "one"} <= set(names) and len(names) < 40


def test_links_from_each_folder_to_each(pack, home, monkeypatch, caplog):
    """More ways lead through twenty of them than anyone can go."""
    monkeypatch.setattr(pack.nodes.folders, "MOST_FOLDERS", 500)
    for i in range(20):
        folder = make(home / "diffusers" / str(i), model_index__json="{}")
        for j in range(20):
            (folder / f"to{j}").symlink_to(home / "diffusers" / str(j))
    assert {str(i) for i in range(20)} <= set(choices(pack))
    assert "holds more than 500 folders" in caplog.text


def test_the_states_of_tunings_beside_odd_entries(pack, home, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(home / "user"))
    states, state_path = make(home / "user/tune_a_video"), pack.nodes.tune.state_path
    make(states / "folder.safetensors")
    (states / "gone.safetensors").symlink_to("nothing")
    for i in range(6):
        (states / f"{i}.safetensors").write_text("ten bytes!")
        os.utime(states / f"{i}.safetensors", (i, i))
    for free, kept in ((600, range(6)), (500, range(1, 6)), (0, range(3, 6))):  # a tenth of what is free, or four
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        state_path("base", {}, 5)
        assert {path.name for path in states.iterdir()} - {"folder.safetensors", "gone.safetensors"} == {
            f"{i}.safetensors" for i in kept
        }
    shutil.rmtree(home / "user")
    (home / "user").write_text("")
    with pytest.raises(ValueError, match=r"^folder .*tune_a_video can't be made \(Not a directory\), in which"):
        state_path("base", {}, 5)
