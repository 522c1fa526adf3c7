"""The node Load Video Folder: which clips, with which sentences, and what it refuses."""

import os
import shutil

import pytest

from support.clips import counted, shown, write

PICTURES = [counted(number) for number in range(5)]


@pytest.fixture
def clips(pack, monkeypatch, tmp_path):
    """The node's folder of two clips in an input folder in `tmp_path`."""
    (tmp_path / "input" / "clips").mkdir(parents=True)
    monkeypatch.setattr("folder_paths.get_input_directory", lambda: str(tmp_path / "input"))
    clip = write(tmp_path / "clip.mp4", PICTURES)
    for name in ("b.mp4", "a.MP4"):
        shutil.copy(clip, tmp_path / "input" / "clips" / name)
    return tmp_path / "input" / "clips"


def load(pack, folder="clips", sentences="", start=0):
    return pack.nodes.LoadVideoFolder.execute(folder, sentences, start, 2, 2, 64, 32, "stretch").args


def refuses(pack, told, **given):
    with pytest.raises(pack.tav_core.TavError, match=told) as error:
        load(pack, **given)
    assert len(str(error.value).splitlines()) == 1


def test_each_clip_comes_with_its_sentences(pack, clips):
    (clips / "a.txt").write_text("\ufeffa ball \r\n\n a star\nand more", "utf-8")
    (clips / "c.txt").write_text("of no clip")
    images, fps, audio, prompts, edits, names = load(pack, sentences="\n  \na cube; a cone\n", start=1)
    assert names == ["a", "b"] and prompts == ["a ball", "a cube"] and edits == ["a star", "a cone"]
    assert [shown(each * 255) for each in images] == [[1, 3]] * 2 and audio == [None, None] and len(set(fps)) == 1
    (clips / "b.txt").write_text("a cube")
    assert load(pack)[3:5] == (["a ball", "a cube"], ["a star", "a cube"])
    before = pack.nodes.LoadVideoFolder.fingerprint_inputs("clips")
    (clips / "b.txt").write_text("a cone in the snow")
    assert pack.nodes.LoadVideoFolder.fingerprint_inputs("clips") != before


def test_sentences_that_are_missing_or_too_many(pack, clips):
    (clips / "a.txt").write_text("a ball")
    refuses(pack, "folder clips says nothing about b.mp4; write its sentence into b.txt, or a line here")
    refuses(pack, "sentences has 1 lines more than clips without a .txt", sentences="one\ntwo")
    (clips / "b.txt").write_bytes(b"\xff\xfe\x00")
    refuses(pack, "folder b.txt can't be read")


def test_what_is_offered_holds_clips_and_stays_inside(pack, clips, tmp_path):
    (clips.parent / "empty").mkdir()
    (clips.parent / "empty" / "notes.txt").write_text("no video")
    (clips.parent / "linked").symlink_to(clips, target_is_directory=True)
    (clips.parent / "loop").symlink_to("loop")
    os.mkfifo(clips / "pipe.mp4")
    (clips / ".hidden.mp4").write_bytes((clips / "b.mp4").read_bytes())
    (clips / "c.mp4").symlink_to(tmp_path / "clip.mp4")
    (clips / "a.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "secret.txt").write_text("a secret")
    assert pack.nodes.load_folder.choices() == ["clips", "linked", pack.nodes.load_folder.DEMO]
    refuses(pack, "leads out of", sentences="one\ntwo")
    (clips / "a.txt").unlink()
    assert load(pack, sentences="one\ntwo")[5] == load(pack, "linked", "one\ntwo")[5] == ["a", "b"]
    for folder, told in (("empty", "holds no video"), ("nothing", "is no folder"), (".", "is no folder"),
                         ("../input/clips/..", "is no folder"), ("loop", "loop"), ("..", "leads out of")):  # fmt: skip
        refuses(pack, told, folder=folder)


def test_more_than_memory_holds(pack, clips):
    with pytest.raises(pack.tav_core.TavError, match="count 2000 of 4096 x 4096 pixels are"):
        pack.nodes.LoadVideoFolder.execute("clips", "one\ntwo", 0, 1, 1000, 4096, 4096, "crop")


def test_clips_that_ship_with_the_pack(pack):
    images, _, _, prompts, edits, names = load(pack, pack.nodes.load_folder.DEMO)
    assert len(images) == len(names) == len(set(prompts)) == 2
    assert all(prompt != edit for prompt, edit in zip(prompts, edits))
