"""Clips in and out, and the pictures made of them."""

import errno
import os

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tav_core import containers, pictures, video
from tav_core.checkpoint import MINI
from tav_core.errors import TavError
from tav_core.timeline import FOLDER_FPS
from tav_core.video import load_video, save_video, to_frames, to_pixels
from tav_core.visuals import loss_curve, side_by_side, strip

CLIP = MINI.parent / "demo.mp4"
F, H, W = 20, 48, 64


def numbered(f=F, h=H, w=W):
    """Frames whose grey level tells their number, `f h w c`."""
    return (torch.arange(f, dtype=torch.uint8) * 10).reshape(f, 1, 1, 1).repeat(1, h, w, 3)


def numbers(frames):
    return (frames.float().mean((1, 2, 3)) / 10).round().int().tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for suffix in ("mp4", "webm", "gif"):
        save_video(numbered(), folder / f"clip.{suffix}", 10)
    images = folder / "images"
    images.mkdir()
    for number, frame in enumerate(numbered()):
        Image.fromarray(frame.numpy()).save(images / f"{number}.png")  # 10 sorts before 2 as text
    return folder


SOURCES = ("clip.mp4", "clip.webm", "clip.gif", "images")


# -------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(
    "start, stride, count", [(0, 1, None), (0, 1, 4), (3, 1, 5), (7, 3, None), (2, 5, 4), (19, 9, 1)]
)
def test_the_wanted_frames_are_read(folder, name, start, stride, count):
    clip = load_video(folder / name, start=start, stride=stride, count=count)
    expected = list(range(F))[start::stride][:count]
    assert clip.frames.dtype == torch.uint8 and clip.frames.shape == (len(expected), H, W, 3)
    assert numbers(clip.frames) == expected
    assert clip.fps == pytest.approx((FOLDER_FPS if name == "images" else 10) / stride)
    assert clip.source == str(folder / name)


def test_nothing_is_decoded_past_the_last_wanted_frame_nor_converted_beside_the_wanted(folder, monkeypatch):
    looked_at, converted, to_rgb = [], [], containers.to_rgb
    monkeypatch.setattr(containers, "to_rgb", lambda *args: converted.append(args) or to_rgb(*args))
    load_video(folder / "clip.mp4", start=2, stride=3, count=3, callback=looked_at.append)
    assert len(looked_at) == F + 1 + (2 + 2 * 3 + 1)  # packets, the last of them empty, and frames
    assert len(converted) == 3


def test_images_that_are_not_wanted_are_not_opened(folder, monkeypatch):
    names, opened = [], Image.open
    monkeypatch.setattr(pictures.Image, "open", lambda path: names.append(path.stem) or opened(path))
    load_video(folder / "images", start=2, stride=4, count=3)
    assert names == ["2", "6", "10"]


@pytest.mark.parametrize("given, size", [
    ({"width": 32}, (24, 32)), ({"height": 24}, (24, 32)), ({"width": 45}, (34, 45)), ({"height": 1}, (1, 2)),
    ({"width": 40, "height": 40}, (40, 40)), ({"width": 200, "height": 33}, (33, 200)), ({}, (H, W)),
])  # fmt: skip
@pytest.mark.parametrize("fit", video.FITS)
def test_sizes(folder, given, size, fit):
    assert load_video(folder / "images", count=1, fit=fit, **given).frames.shape[1:3] == size


def test_crop_covers_pad_shows_all_stretch_distorts(tmp_path):
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[:, :10], picture[:, 10:30], picture[:, 30:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    Image.fromarray(picture).save(tmp_path / "a.png")
    crop, pad, stretch = (load_video(tmp_path, width=20, height=20, fit=fit).frames[0] for fit in video.FITS)
    assert (crop == torch.tensor([0, 255, 0], dtype=torch.uint8)).all()
    assert not pad[:5].any() and not pad[15:].any() and pad[10, 0, 0] == 255 and pad[10, -1, 2] == 255
    assert stretch[10, 0, 0] == 255 and stretch[10, 10, 1] == 255 and stretch[10, -1, 2] == 255


def test_images_of_several_sizes_are_brought_to_one(tmp_path):
    for number, size in enumerate([(40, 30), (30, 40)]):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    assert load_video(tmp_path, width=16, height=16).frames.shape == (2, 16, 16, 3)
    with pytest.raises(TavError, match="several sizes; give width and height"):
        load_video(tmp_path)


def test_clips_of_a_turned_phone_are_read_upright(tmp_path):
    frames = torch.zeros(2, 32, 64, 3, dtype=torch.uint8)
    frames[:, :16, :16] = 255  # the upper left corner
    save_video(frames, tmp_path / "a.mp4", 8)
    content = (tmp_path / "a.mp4").read_bytes()
    at = content.index(b"tkhd") + 44  # the matrix of the track, 3x3: turn it clockwise
    turned = b"".join(n.to_bytes(4, "big", signed=True) for n in (0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30))
    (tmp_path / "a.mp4").write_bytes(content[:at] + turned + content[at + 36 :])
    frame = load_video(tmp_path / "a.mp4").frames[0]
    assert frame.shape == (64, 32, 3) and frame[:16, 16:].min() > 200 and frame[:, :12].max() < 50


@pytest.mark.parametrize("given, told", [
    ({"start": -1}, "start=-1"), ({"stride": 0}, "stride=0"), ({"count": 0}, "count=0"), ({"width": 0}, "width=0"),
    ({"height": -8}, "height=-8"), ({"fit": "zoom"}, "fit='zoom'.*crop, pad, stretch"),
    ({"start": F}, "start=20 is past the end"),
    ({"count": F + 1}, "count=21 is more than the 20 frames"),
    ({"start": 5, "stride": 4, "count": 9}, "count=9 is more than the 4 frames .* from start 5 with stride 4; give 4,"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["clip.mp4", "images"])
def test_wrong_values_are_named(folder, name, given, told):
    refused(told, folder / name, **given)


def test_files_that_are_no_clips(folder, tmp_path):
    refused("does not exist", tmp_path / "none.mp4")
    refused("without images", tmp_path)
    for content in (b"", b"plain text", (folder / "clip.mp4").read_bytes()[:500]):
        (tmp_path / "broken.mp4").write_bytes(content)
        refused("broken.mp4", tmp_path / "broken.mp4")
    (tmp_path / "broken.mp4").unlink()
    (tmp_path / "a.png").write_bytes(b"plain text")
    refused("a.png", tmp_path)


def refused(told, *args, **kwargs):
    with pytest.raises(TavError, match=told) as error:
        load_video(*args, **kwargs)
    assert len(str(error.value).splitlines()) == 1


# -------------------------------------------------------------------------------------------------- writing


def test_mp4_plays_in_browsers(folder):
    with av.open(str(folder / "clip.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
    content = (folder / "clip.mp4").read_bytes()
    assert content.find(b"moov") < content.find(b"mdat")  # plays before it is loaded


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_odd_sizes_grow_by_a_copy_of_the_edge(tmp_path, suffix):
    save_video(numbered(3, 33, 47) + 100, tmp_path / f"a{suffix}", 8)
    frames = load_video(tmp_path / f"a{suffix}").frames
    assert frames.shape == (3, 34, 48, 3) and (frames[:, -1].int() - frames[:, 0].int()).abs().max() <= 3


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_the_same_frames_make_the_same_file(tmp_path, suffix):
    rng, files = np.random.default_rng(0), set()
    frames = load_video(CLIP, count=8, width=64, height=64).frames.int()
    frames = (frames + torch.from_numpy(rng.integers(-20, 20, frames.shape))).clamp(0, 255).byte()
    for _ in range(8):
        junk = [torch.randn(int(rng.integers(1, 40000))) for _ in range(20)]  # memory lies elsewhere each time
        save_video(frames, tmp_path / f"a{suffix}", 8)
        files.add((tmp_path / f"a{suffix}").read_bytes())
        del junk
    assert len(files) == 1


@pytest.mark.parametrize("fps", [0.5, 8, 23.976, 30000 / 1001, 60])
def test_the_rate_is_kept(tmp_path, fps):
    save_video(numbered(4), tmp_path / "a.mp4", fps)
    clip = load_video(tmp_path / "a.mp4")
    assert len(clip.frames) == 4 and clip.fps == pytest.approx(fps, rel=1e-4)


def test_float_frames_and_arrays(tmp_path):
    frames = numbered(3)
    for number, given in enumerate((frames, frames.numpy(), frames / 255, (frames / 255).double().numpy())):
        save_video(given, tmp_path / f"{number}.mp4", 8)
        read = load_video(tmp_path / f"{number}.mp4").frames
        assert (read.float() - frames.float()).abs().mean() < 2


def test_colours_survive(tmp_path):
    frames = torch.zeros(2, 32, 96, 3)
    for i in range(3):
        frames[:, :, 32 * i : 32 * i + 32, i] = 1
    save_video(frames, tmp_path / "a.mp4", 8)
    back = load_video(tmp_path / "a.mp4").frames[0, 16, 16::32].float() / 255
    assert (back - torch.eye(3)).abs().max() < 0.03


@pytest.mark.parametrize("name, fps", [("a.avi", 8), ("a", 8), ("a.mp4", 0), ("a.mp4", -1)])
def test_what_cannot_be_written(tmp_path, name, fps):
    with pytest.raises(TavError):
        save_video(numbered(2), tmp_path / name, fps)
    assert not list(tmp_path.iterdir())


def test_pixels_and_back():
    frames = torch.arange(256, dtype=torch.uint8).reshape(4, 4, 16, 1).repeat(1, 1, 1, 3)
    pixels = to_pixels(frames)
    assert pixels.shape == (1, 3, 4, 4, 16) and pixels.min() == -1 and pixels.max() == 1
    assert torch.equal(to_frames(pixels), frames)
    assert (to_frames(pixels.sign() * 9) == (pixels[0] > 0).permute(1, 2, 3, 0) * 255).all()  # clamped


# ------------------------------------------------------------------------------------------------- pictures


def test_strip(tmp_path):
    image = strip([numbered(), numbered(3, 64, 64)], ["source", "words " * 60], tmp_path / "strip.png")
    with Image.open(tmp_path / "strip.png") as written:
        assert written.size == image.size
    assert image.width > 8 * 128 and image.height > 2 * 128  # small frames are enlarged
    assert strip([numbered(1)], ["one"]).width < 400


def test_side_by_side_holds_the_last_frame():
    tiles = side_by_side([numbered(5), numbered(2)], ["long", "short"])
    assert tiles.dtype == torch.uint8 and len(tiles) == 5
    half = tiles.shape[2] // 2
    assert not torch.equal(tiles[0], tiles[4])
    assert torch.equal(tiles[1, :, half:], tiles[4, :, half:])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
def test_side_by_side_takes_any_number(count):
    tiles = side_by_side([numbered(2)] * count, [f"video {i}" for i in range(count)])
    assert tiles.shape[0] == 2 and tiles.shape[3] == 3


def test_loss_curve(tmp_path):
    loss_curve([0.3, 0.2, 0.1], [(0, 0.25), (3, 0.1)], tmp_path / "loss.png")
    loss_curve([0.3], [(0, 0.25)])
    assert Image.open(tmp_path / "loss.png").width > 400


# ------------------------------------------------------------------------- images that are not plain RGB, frames


def test_images_are_shown_as_viewers_show_them(tmp_path):
    upright = Image.new("RGB", (20, 10))
    exif = upright.getexif()
    exif[274] = 6  # a phone held upright
    for name, image, options in (
        ("exif.jpg", upright, {"exif": exif}),
        ("clear.png", Image.new("RGBA", (10, 20), (255, 0, 0, 0)), {}),
        ("deep.png", Image.fromarray(np.full((20, 10), 40000, np.uint16)), {}),
    ):
        image.save(tmp_path / name, **options)
    clear, deep, turned = load_video(tmp_path).frames  # h w of all three: 20 10
    assert not clear.any() and not turned.any() and (deep == 155).all()


@pytest.mark.parametrize("fps", [float("nan"), float("inf"), 1e-4, 1e4])
def test_rates_that_are_no_numbers(tmp_path, fps):
    with pytest.raises(TavError, match="fps"):
        save_video(numbered(2), tmp_path / "a.mp4", fps)


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (8, 8, 3), (2, 8, 8, 4)])
@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_frames_that_are_no_video(tmp_path, shape, suffix):
    with pytest.raises(TavError, match="no video"):
        save_video(torch.zeros(shape, dtype=torch.uint8), tmp_path / f"a{suffix}", 8)


def test_colours_are_tagged(folder):
    with av.open(str(folder / "clip.mp4")) as container:
        frame = next(container.decode(video=0))
    assert (int(frame.colorspace), int(frame.color_range)) == (5, 1)  # BT.601, limited


def test_gif_keeps_a_rate_that_players_honour(tmp_path):
    save_video(numbered(4), tmp_path / "a.gif", 60)
    assert load_video(tmp_path / "a.gif").fps == 50


def test_side_by_side_names_unlike_sizes():
    with pytest.raises(TavError, match="64x48, 64x64"):
        side_by_side([numbered(2), numbered(2, 64, 64)], ["a", "b"])


def test_labels_grow_with_the_frames():
    small, large = (strip([numbered(1, n, n)], ["source"]).height - n for n in (128, 512))
    assert large > 1.5 * small


# ------------------------------------------------------------------------------------- what goes wrong on a disk


def test_a_clip_that_is_cut_off_is_told(tmp_path):
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8))
    save_video(frames, tmp_path / "a.mp4", 8)
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[: len(content) * 6 // 10])
    for count in (None, 8):  # older decoders than PyAV 17's find the rest broken themselves
        refused("cut off|can't be decoded", tmp_path / "a.mp4", count=count)
    if hasattr(av.stream.Stream, "index_entries"):  # which they read ahead to
        assert len(load_video(tmp_path / "a.mp4", count=2).frames) == 2  # these are whole


def test_hidden_files_are_no_images(folder, tmp_path):
    numbered_image = (folder / "images" / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(numbered_image)
    (tmp_path / "._3.png").write_bytes(b"left by macOS")
    assert numbers(load_video(tmp_path).frames) == [3]


def test_stripes_average_where_one_axis_shrinks_and_the_other_grows(tmp_path):
    stripes = np.zeros((16, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    frame = load_video(tmp_path, width=100, height=160, fit="stretch").frames[0].int()
    assert (frame - 128).abs().max() < 40  # without averaging there are black and white ones


def test_a_round_trip_keeps_the_picture(tmp_path):
    y, x = np.mgrid[:64, :96] / 15
    frames = [np.stack([np.sin(x + k / 3), np.cos(y), np.sin(x - y)], -1) for k in range(6)]
    frames = torch.from_numpy(np.stack(frames) * 0.4 + 0.5)
    for suffix, least in ((".mp4", 36), (".webm", 33), (".gif", 28)):
        save_video(frames, tmp_path / f"a{suffix}", 10)
        back = load_video(tmp_path / f"a{suffix}").frames / 255
        assert -10 * (back - frames).square().mean().log10() > least, suffix


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"before")
    opened = av.open

    class Full:
        def __init__(self, path, *args, **options):
            self.container = opened(path, *args, **options)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.container.close()

        def add_stream(self, *args, **options):
            return self.container.add_stream(*args, **options)

        def mux(self, packets):
            self.container.mux(packets)
            raise av.error.OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(av, "open", Full)
    with pytest.raises(TavError, match=r"can't be written \(No space left on device\); free space or"):
        save_video(numbered(4), tmp_path / f"a{suffix}", 8)
    assert [p.name for p in tmp_path.iterdir()] == [f"a{suffix}"]
    assert (tmp_path / f"a{suffix}").read_bytes() == b"before"
