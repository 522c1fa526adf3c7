"""The node Load Video: its menu, what it refuses, its sound, and Cancel."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support.clips import counted, shown, write
from tav_core import save_video
from tav_core.sound import Sound

PICTURES = [counted(number) for number in range(9)]


@pytest.fixture
def node(pack, monkeypatch, tmp_path):
    """Load Video, with an input folder in `tmp_path`."""
    (tmp_path / "input").mkdir()
    monkeypatch.setattr("folder_paths.get_input_directory", lambda: str(tmp_path / "input"))
    return pack.nodes.LoadVideo


def load(node, name, start=0, stride=1, count=3):
    return node.execute(name, start, stride, count, 64, 32, "stretch").args


def offered(pack) -> list[str]:
    return [name for name in pack.nodes.load_video.choices() if name not in pack.nodes.load_video.SHIPPED]


def folder_of_pictures(folder: Path) -> Path:
    folder.mkdir()
    for number, picture in enumerate(PICTURES):
        Image.fromarray(picture).save(folder / f"{number}.png")
    return folder


def test_what_is_offered_loads_and_what_is_not_does_not(pack, node, tmp_path):
    folder, outside = tmp_path / "input", tmp_path / "outside"
    outside.mkdir()
    clip = write(outside / "clip.mp4", PICTURES)
    for name in ("a.mp4", "b.MOV", "12:30.mp4"):
        shutil.copy(clip, folder / name)
    for name in ("c.ts", "d.mts", "e.m2ts", "f.mpg", "g.avi"):
        write(folder / name, PICTURES, codec="mpeg2video" if name == "f.mpg" else "libx264")
    images = [Image.fromarray(picture) for picture in PICTURES]
    for name in ("UPPER.GIF", "moving.webp", "moving.png"):
        images[0].save(folder / name, save_all=True, append_images=images[1:], duration=100)
    images[0].save(folder / "still.webp")
    images[0].save(folder / "still.png")
    (folder / "notes.txt").write_text("no video")
    (folder / ".hidden.mp4").write_bytes(clip.read_bytes())
    folder_of_pictures(folder / "pictures")
    (folder / "empty").mkdir()
    (folder / "empty" / "._1.png").write_text("left by macOS")
    # links that the user has put there
    (folder / "linked.mp4").symlink_to(clip)
    (folder / "linked").symlink_to(folder_of_pictures(outside / "pictures"), target_is_directory=True)
    # and what can't be used
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (folder / "gone.mp4").symlink_to("gone")
    os.mkfifo(folder / "pipe.mp4")
    folder_of_pictures(folder / "leading out")
    (folder / "leading out" / "9.png").symlink_to(outside / "pictures" / "1.png")

    loads = ["12:30.mp4", "UPPER.GIF", "a.mp4", "b.MOV", "c.ts", "d.mts", "e.m2ts", "f.mpg", "g.avi", "linked.mp4",
             "moving.png", "moving.webp", "linked", "pictures"]  # fmt: skip
    assert offered(pack) == loads
    for name in loads:
        assert node.validate_inputs(name) is True and node.fingerprint_inputs(name)
        assert shown(load(node, name)[0] * 255) == [0, 1, 2], name
    told = node.validate_inputs("leading out")
    assert "leads out of leading out; give a name inside of it" in told
    for name in ("loop.mp4", "gone.mp4", "leading out", "pipe.mp4"):
        with pytest.raises(pack.tav_core.TavError) as error:
            load(node, name)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", [
    "../outside.mp4", "/etc/passwd", "linked/../../outside.mp4", "a/../../outside.mp4", "..", "linked/out.mp4",
    "folder/out.mp4", "\0", ".",
])  # fmt: skip
def test_a_name_stays_inside_of_what_it_names(pack, node, tmp_path, name):
    shutil.copy(write(tmp_path / "outside.mp4", PICTURES), tmp_path / "elsewhere.mp4")
    (tmp_path / "library").mkdir()
    for folder in (tmp_path / "library", tmp_path / "input" / "folder"):
        folder.mkdir(exist_ok=True)
        (folder / "out.mp4").symlink_to(tmp_path / "outside.mp4")
    (tmp_path / "input" / "linked").symlink_to(tmp_path / "library", target_is_directory=True)
    told = node.validate_inputs(name)
    assert told is not True and len(told.splitlines()) == 1
    with pytest.raises(pack.tav_core.TavError):
        load(node, name)


def test_the_menu_survives_what_it_cannot_look_at(pack, node, tmp_path, monkeypatch):
    shutil.copy(write(tmp_path / "clip.mp4", PICTURES), tmp_path / "input" / "a.mp4")
    folder_of_pictures(tmp_path / "input" / "lost+found")
    pictures = pack.nodes.load_video.pictures

    def refuse(path):
        if path.name == "lost+found":
            raise PermissionError(13, "Permission denied", str(path))
        return pictures(path)

    monkeypatch.setattr(pack.nodes.load_video, "pictures", refuse)
    assert offered(pack) == ["a.mp4"]
    shutil.rmtree(tmp_path / "input")
    assert offered(pack) == []


def test_the_sound_is_in_time_with_the_frames(node, tmp_path):
    ramp = torch.linspace(-0.5, 0.5, 24000)  # a second and a half
    sound = Sound((ramp * torch.sin(torch.arange(24000) * 0.2))[None], 16000)
    save_video(np.stack([PICTURES[number % 9] for number in range(12)]), tmp_path / "input" / "a.mp4", 8, sound)
    images, fps, count, audio = load(node, "a.mp4", start=2, stride=3, count=3)
    assert (len(images), fps, count) == (3, 8 / 3, 3)
    assert audio["sample_rate"] == 16000 and audio["waveform"].shape == (1, 1, 18000)
    wrong = (audio["waveform"][0] - sound.samples[:, 4000:22000]).abs().mean()
    assert wrong < 0.02 < 0.1 < (audio["waveform"][0] - sound.samples[:, 3960:21960]).abs().mean()
    save_video(np.stack(PICTURES), tmp_path / "input" / "b.mp4", 8)
    assert load(node, "b.mp4")[3] is None


def test_create_video_takes_the_sound(node, tmp_path):
    from comfy_extras.nodes_video import CreateVideo

    sound = Sound(torch.sin(torch.arange(16000) * 0.2)[None] / 2, 16000)
    for name, heard in (("a.mp4", sound), ("b.mp4", None)):
        save_video(np.stack(PICTURES[:8]), tmp_path / "input" / name, 8, heard)
        images, fps, _, audio = load(node, name, count=8)
        CreateVideo.execute(images, fps, audio).args[0].save_to(str(tmp_path / "input" / "made.mp4"))
        made = load(node, "made.mp4", count=8)
        assert made[1] == 8 and shown(made[0] * 255) == list(range(8))
        assert (made[3] is None) == (heard is None)


def test_cancel_is_answered_while_a_clip_is_read(node, tmp_path):
    import comfy.model_management as management

    shutil.copy(write(tmp_path / "clip.mp4", PICTURES), tmp_path / "input" / "a.mp4")
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        load(node, "a.mp4")
    assert len(load(node, "a.mp4")[0]) == 3
