"""Clips as people have them: read as a player shows them, or refused in one line."""

import os
import shutil
import socket
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image, features

from support import ROOT
from support.clips import counted, shown, turned, write
from support.errors import refused
from tav_core import containers
from tav_core.errors import Cancelled
from tav_core.events import Reading
from tav_core.timeline import timeline_of
from tav_core.video import load_video, save_video

N = 40
COUNTED = [counted(number) for number in range(N)]
MS = Fraction(1, 1000)

# -------------------------------------------------------------------------------------------- frames and time


def every_instant(stamps, tick, clip):
    """Each frame of the clip is the one nearest to its instant, either of two in the middle."""
    times = (np.array(stamps) - stamps[0]) * float(tick)
    for number, frame in enumerate(shown(clip.frames)):
        offsets = times[: len(stamps)] - number / clip.fps
        assert offsets[frame] <= 0.51 / clip.fps, (number, frame)  # it has begun
        later = offsets[frame + 1 :]
        assert (later > 0.49 / clip.fps).all(), (number, frame)  # and no later one has


SLOWER = [round(i * 1000 / 30) for i in range(20)] + [round(667 + i * 1000 / 6) for i in range(20)]
BURSTS = np.cumsum([0] + [17 if i % 9 else 700 for i in range(1, N)]).tolist()
DROPS = [round(1000 / 25 * (i + 3 * (i // 7))) for i in range(N)]


@pytest.mark.parametrize("stamps, rate", [(SLOWER, 30), (BURSTS, 59), (DROPS, 25)])
@pytest.mark.parametrize("name, codec, tick", [
    ("a.mp4", "libx264", Fraction(1, 90000)), ("a.mkv", "libx264", MS), ("a.webm", "libvpx-vp9", MS),
])  # fmt: skip
def test_uneven_clips_play_in_the_time_that_they_took(tmp_path, name, codec, tick, stamps, rate):
    ticks = [round(stamp * MS / tick) for stamp in stamps]
    path = write(tmp_path / name, COUNTED, ticks, tick, codec=codec)
    clip = load_video(path)
    assert clip.fps == pytest.approx(rate, rel=0.01)
    assert len(clip.frames) / clip.fps == pytest.approx((stamps[-1] - stamps[0]) / 1000, abs=0.2)
    every_instant(stamps, MS, clip)
    assert set(shown(clip.frames)) == set(range(N))  # nothing is lost
    part = load_video(path, start=25, stride=7, count=5)
    assert torch.equal(part.frames, clip.frames[25:60:7]) and part.fps == clip.fps / 7


def test_nobody_gets_millions_of_frames_unasked(tmp_path):
    path = write(tmp_path / "a.mkv", COUNTED[:9], [*range(0, 264, 33), 10**8], MS)
    refused("count is missing, and .* lasts for 3000001 frames; say how many", path, call=load_video)
    assert shown(load_video(path, start=1000, stride=1000, count=3).frames) == [7, 7, 7]


def test_gifs_show_each_picture_for_its_delay(tmp_path):
    images = [Image.fromarray(picture) for picture in COUNTED[:4]]
    for suffix in ("gif", "png", "webp", *(["avif"] if features.check("avif") else [])):
        path = tmp_path / f"a.{suffix}"
        options = {} if suffix == "avif" else {"lossless": True}
        images[0].save(path, save_all=True, append_images=images[1:], duration=[100, 100, 400, 200], **options)
        clip = load_video(path)
        assert clip.fps == pytest.approx(10) and shown(clip.frames) == [0, 1, 2, 2, 2, 2, 3, 3]
        assert shown(load_video(path, start=4, stride=2, count=2).frames) == [2, 3]


def test_an_edit_list_cuts_what_it_cuts(tmp_path):
    """As phones do that trim a clip: what comes before the first wanted frame is in the file, and not shown."""
    path = write(tmp_path / "a.mp4", COUNTED, x264_params="keyint=10")
    whole = load_video(path)
    content = path.read_bytes()
    at = content.index(b"elst") + 12  # after version and count: duration, then the time at which it begins
    begin = int.from_bytes(content[at + 4 : at + 8], "big") + 13 * 512  # of 15360 a second, 512 a frame
    path.write_bytes(content[: at + 4] + begin.to_bytes(4, "big") + content[at + 8 :])
    cut = load_video(path)
    assert cut.fps == 30 and shown(cut.frames) == list(range(13, N))
    assert torch.equal(cut.frames, whole.frames[13:])
    assert torch.equal(load_video(path, start=20, count=3).frames, whole.frames[33:36])


NTSC = Fraction(30000, 1001)


@pytest.mark.parametrize("name, codec, rate, options", [
    ("a.mp4", "libx264", NTSC, {"x264_params": "bframes=3:b-adapt=0:keyint=12:open-gop=1"}),
    ("a.mkv", "libx264", NTSC, {"x264_params": "keyint=12"}),
    ("a.ts", "libx264", NTSC, {"x264_params": "bframes=3:b-adapt=0:keyint=12:open-gop=1"}),
    ("a.mpg", "mpeg2video", Fraction(25), {"g": "12", "bf": "2"}),
    ("a.webm", "libvpx", NTSC, {"deadline": "realtime", "auto_alt_ref": "1", "lag_in_frames": "16", "g": "12"}),
    ("a.webm", "libvpx-vp9", Fraction(24000, 1001), {"g": "12"}),
    ("a.avi", "libx264", NTSC, {"x264_params": "keyint=12"}),
    ("a.flv", "flv", Fraction(25), {"g": "12"}),
    ("a.h264", "libx264", Fraction(25), {"x264_params": "keyint=12"}),
])  # fmt: skip
@pytest.mark.parametrize("late", [0, 7])
def test_even_clips_keep_every_frame_and_their_rate(tmp_path, name, codec, rate, options, late):
    path = write(tmp_path / name, COUNTED, range(late, N + late) if late else None, 1 / rate,
                 codec=codec, rate=rate, **options)  # fmt: skip
    if name == "a.avi" and late:
        pytest.skip("ffmpeg holds the first frame there for as long")
    clip = load_video(path)
    assert clip.fps == pytest.approx(float(rate), rel=1e-6)
    assert shown(clip.frames) == list(range(N))
    for start in (1, 11, 12, 13, 25, 36, 39):  # about key frames, by seeking or not
        assert torch.equal(load_video(path, start=start).frames, clip.frames[start:])


@pytest.mark.parametrize("stamps, rate, numbers", [
    ([round(i * 1001 / 30) for i in range(20000)], NTSC, range(20001)),  # rounded, for eleven minutes
    ([0, 33, 33, 100, 133, 167], 30, range(7)),  # two with one stamp
    ([i * 1000 // 24 // 17 * 17 for i in range(48)], 24, range(49)),  # of a screen of 60
    ([5, 38, 72, 272, 305], 30, [0, 1, 2, 8, 9, 10]),
    ([0], 8, range(2)),
])  # fmt: skip
def test_numbers_of_time_stamps(stamps, rate, numbers):
    line = timeline_of(reversed(stamps), None, MS, [Fraction(30), Fraction(8)] if len(stamps) > 1 else [Fraction(8)])
    assert float(line.rate) == pytest.approx(float(rate), rel=1e-4)
    assert list(line.numbers) == list(numbers) and line.total == numbers[-1]
    assert line.even == isinstance(numbers, range)


def test_a_late_start_is_sought(tmp_path):
    path = write(tmp_path / "a.mp4", COUNTED * 5, x264_params="keyint=10")
    events = []
    assert shown(load_video(path, start=4 * N + 5, count=2, callback=events.append).frames) == [5, 6]
    assert len(events) < 5 * N + 1 + 10  # packets, and the frames of one group of pictures


def test_where_seeking_fails_the_clip_is_decoded(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mkv", COUNTED, x264_params="keyint=10")
    whole, opened = load_video(path), containers.opened
    for landed in (0, 39 * 33):  # at the beginning, and behind what is wanted

        class Astray:
            def __init__(self, container):
                self.container = container

            def __getattr__(self, name):
                return getattr(self.container, name)

            def seek(self, offset, **options):
                self.container.seek(landed, **options)  # noqa: B023

        class Opened:
            def __init__(self, path):
                self.inner = opened(path)

            def __enter__(self):
                return Astray(self.inner.__enter__())

            def __exit__(self, *error):
                return self.inner.__exit__(*error)

        monkeypatch.setattr(containers, "opened", Opened)
        assert torch.equal(load_video(path, start=25, count=4).frames, whole.frames[25:29])


@pytest.mark.parametrize("name, after", [("a.mp4", 1), ("a.mp4", N + 5), ("a.webp", 1), ("a.webp", N + 5),
                                         ("folder", 1), ("folder", 9)])  # fmt: skip
def test_reading_can_be_stopped(tmp_path, name, after):
    images = [Image.fromarray(picture) for picture in COUNTED]
    if name == "a.mp4":
        write(tmp_path / name, COUNTED)
    elif name == "a.webp":
        images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=100)
    else:
        (tmp_path / name).mkdir()
        for number, image in enumerate(images):
            image.save(tmp_path / name / f"{number}.png")
    seen = []

    def stop(event):
        seen.append(event)
        if len(seen) == after:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        load_video(tmp_path / name, callback=stop)
    assert len(seen) == after and isinstance(seen[0], Reading)


# ------------------------------------------------------------------------------------------------- what is seen


MATRICES = {  # a b c d, and what a player makes of a picture
    (1, 0, 0, 1): lambda x: x, (0, 1, -1, 0): lambda x: np.rot90(x, -1), (-1, 0, 0, -1): lambda x: np.rot90(x, 2),
    (0, -1, 1, 0): lambda x: np.rot90(x), (-1, 0, 0, 1): lambda x: x[:, ::-1], (1, 0, 0, -1): lambda x: x[::-1],
    (0, 1, 1, 0): lambda x: x.transpose(1, 0, 2), (0, -1, -1, 0): lambda x: np.rot90(x, 2).transpose(1, 0, 2),
}  # fmt: skip
QUARTERS = np.zeros((32, 64, 3), np.uint8)
QUARTERS[:16, :32], QUARTERS[:16, 32:], QUARTERS[16:, :32] = (220, 30, 30), (30, 220, 30), (30, 30, 220)


@pytest.mark.parametrize("matrix", MATRICES)
def test_every_display_matrix(tmp_path, matrix):
    save_video(QUARTERS[None], tmp_path / "a.mp4", 8)
    plain = load_video(tmp_path / "a.mp4").frames[0].numpy()
    found = load_video(turned(tmp_path / "a.mp4", matrix)).frames[0].numpy()
    assert np.array_equal(found, MATRICES[matrix](plain))


def circle(height, width, aspect):
    y, x = np.mgrid[:height, :width]
    away = np.hypot((x - width / 2 + 0.5) * aspect, y - height / 2 + 0.5)
    share = np.clip(height * 0.25 - away + 0.5, 0, 1)  # soft at the edge
    return (20 + 200 * share[..., None]).repeat(3, -1).astype(np.uint8)


@pytest.mark.parametrize("aspect", [Fraction(64, 45), Fraction(8, 9)])
@pytest.mark.parametrize("quarter", [False, True])
@pytest.mark.parametrize("size", [
    {}, {"width": 90}, {"height": 60}, {"width": 80, "height": 80}, {"width": 80, "height": 80, "fit": "pad"},
    {"width": 160, "height": 90}, {"width": 60, "height": 140, "fit": "pad"},
])  # fmt: skip
def test_a_circle_stays_a_circle(tmp_path, aspect, quarter, size):
    path = write(tmp_path / "a.mp4", [circle(192, 256, float(aspect))], aspect=aspect)
    if quarter:
        turned(path, (0, 1, -1, 0))
    light = ((load_video(path, **size).frames[0, ..., 1].float() - 20) / 200).clamp(0, 1)
    height, width = light.shape
    down, across = light[:, width // 2].sum(), light[height // 2].sum()  # the diameters, finer than a pixel
    assert abs(down - across) <= 1 and down > 15
    if not size:
        assert max(down, across) >= 0.49 * 192  # no pixel is lost


@pytest.mark.parametrize("name, codec, form, options", [
    ("a.webm", "libvpx-vp9", "yuva420p", {}), ("a.webm", "libvpx", "yuva420p", {"auto_alt_ref": "0"}),
    ("a.mov", "prores_ks", "yuva444p10le", {}), ("a.mov", "qtrle", "argb", {}), ("a.mov", "png", "rgba", {}),
])  # fmt: skip
def test_what_is_transparent_is_black(tmp_path, name, codec, form, options):
    picture = np.full((64, 64, 4), (40, 200, 40, 255), np.uint8)
    picture[:, :24, 3] = 0
    picture[:, 40:, 3] = 128
    write(tmp_path / name, [picture] * 2, codec=codec, form=form, metadata={"alpha_mode": "1"}, **options)
    frame = load_video(tmp_path / name).frames[1, 32].float()
    assert frame[:20].max() < 12
    assert (frame[30] - torch.tensor([40.0, 200, 40])).abs().max() < 12
    assert (frame[50] - torch.tensor([20.0, 100, 20])).abs().max() < 12


WEIGHTS = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}  # of red and blue, by matrix


def patch(rgb, matrix: int, full: bool = False, form: str = "yuv420p10le", height: int = 64, width: int = 64):
    """A frame of one colour, R'G'B' in 0..1, computed here and not by ffmpeg."""
    red, blue = WEIGHTS[matrix]
    luma = red * rgb[0] + (1 - red - blue) * rgb[1] + blue * rgb[2]
    chroma = (rgb[2] - luma) / (2 - 2 * blue), (rgb[0] - luma) / (2 - 2 * red)
    depth = 1024 if "10" in form else 256
    low, span, swing = (0, depth - 1, depth - 1) if full else (depth / 16, depth * 219 / 256, depth * 224 / 256)
    values = [low + span * luma, *(depth / 2 + swing * value for value in chroma)]
    frame = av.VideoFrame(width, height, form)
    for plane, value in zip(frame.planes, values):
        number = np.uint16(round(value)) if depth == 1024 else np.uint8(min(255, round(value)))
        plane.update(np.full(plane.buffer_size // number.nbytes, number).tobytes())
    return frame


def read_patch(tmp_path, rgb, matrix, tags, **more):
    form = more.get("form", "yuv420p")
    frames = [patch(rgb, matrix, **{"form": form} | more)] * 2
    for frame in frames:
        for name in {"colorspace", "color_range"} & set(tags):
            setattr(frame, name, tags[name])
    path = write(tmp_path / "a.mp4", frames, form=form, tags=tags, qp="0")
    return load_video(path).frames[0, 20:40, 20:40].float().mean((0, 1))


ORANGE = (0.9, 0.5, 0.2)


@pytest.mark.parametrize("matrix, tags, more", [
    (1, {"colorspace": 1, "color_range": 1}, {}), (5, {"colorspace": 5, "color_range": 1}, {}),
    (1, {"colorspace": 1, "color_range": 2}, {"full": True}), (5, {"colorspace": 6, "color_range": 2}, {"full": True}),
    (1, {}, {"height": 720, "width": 1280}), (5, {}, {}), (5, {}, {"height": 576, "width": 720}),
    (1, {"colorspace": 1, "color_range": 1}, {"form": "yuv420p10le"}),
    (9, {"colorspace": 9, "color_range": 1}, {"form": "yuv420p10le"}),
])  # fmt: skip
def test_colours_of_every_matrix(tmp_path, matrix, tags, more):
    found = read_patch(tmp_path, ORANGE, matrix, tags, **more)
    assert (found - torch.tensor(ORANGE) * 255).abs().max() < 3  # another matrix or range: 10 or more


PQ, HLG = 16, 18


@pytest.mark.parametrize("transfer, signal, grey", [
    (PQ, 0.0, 0), (PQ, 0.3800, 108), (PQ, 0.5807, 230), (PQ, 0.7518, 255), (PQ, 1.0, 255),  # 26, 203, 1000 cd/m2
    (HLG, 0.0, 0), (HLG, 0.38, 109), (HLG, 0.75, 230), (HLG, 1.0, 255),  # 18 % grey and white of BT.2408
])  # fmt: skip
def test_hdr_greys(tmp_path, transfer, signal, grey):
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": transfer, "color_range": 1}
    found = read_patch(tmp_path, (signal,) * 3, 9, tags, form="yuv420p10le")
    assert (found - grey).abs().max() < 3


@pytest.mark.parametrize("primaries, rgb709", [(9, (0.6, 0.3, 0.2)), (12, (0.2, 0.5, 0.7))])
def test_colours_of_wide_gamuts(tmp_path, primaries, rgb709):
    # from the primaries and the white of H.273 to XYZ, and back
    corners = {1: (0.64, 0.33, 0.30, 0.60, 0.15, 0.06), 9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
               12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060)}  # fmt: skip

    def to_xyz(number):
        xy = np.array(corners[number]).reshape(3, 2)
        columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in xy]).T
        white = np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])
        return columns * np.linalg.solve(columns, white)

    linear = np.array(rgb709) ** 2.4
    wide = np.linalg.solve(to_xyz(primaries), to_xyz(1) @ linear) ** (1 / 2.4)
    matrix = 9 if primaries == 9 else 1
    tags = {"colorspace": matrix, "color_primaries": primaries, "color_trc": 1, "color_range": 1}
    found = read_patch(tmp_path, wide, matrix, tags, form="yuv420p10le")
    assert (found - torch.tensor(rgb709) * 255).abs().max() < 3
    assert np.abs(wide * 255 - np.array(rgb709) * 255).max() > 9  # what it would be unconverted


# ------------------------------------------------------------------------------------- what else lies in folders


@pytest.mark.parametrize("name", ["2024-01-01T12:30.mp4", "concat:a.mp4", "data:a.mp4", "http:.mp4", "%03d.mp4",
                                  "file:a.mp4", "-i.mp4", "a b?c#d.mp4", "ä漢.mp4"])  # fmt: skip
def test_any_name_is_that_of_a_file(tmp_path, monkeypatch, name):
    write(tmp_path / "plain.mp4", COUNTED[:3])
    shutil.copy(tmp_path / "plain.mp4", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for path in (name, tmp_path / name):
        assert shown(load_video(path).frames) == [0, 1, 2]


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_name_that_is_no_text(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.mp4")
    write(tmp_path / "plain.mp4", COUNTED[:3])
    shutil.copy(tmp_path / "plain.mp4", path)
    assert shown(load_video(path).frames) == [0, 1, 2]


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{path}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{path}'\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
            'mediaPresentationDuration="PT1S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="0">'
            "<BaseURL>{path}</BaseURL></Representation></AdaptationSet></Period></MPD>",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
           "a=rtpmap:96 H264/90000\n",
    "smil": '<smil><body><video src="{path}"/></body></smil>', "asx": '<asx><entry><ref href="{path}"/></entry></asx>',
    "rtsp": "[Reference]\nRef1={path}\n", "text": "plain text\n" * 99,
}  # fmt: skip


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("suffix", [".mp4", ".m3u8", ".ffconcat", ".mpd", ".sdp"])
def test_playlists_read_no_other_file(tmp_path, monkeypatch, kind, suffix):
    (tmp_path / "outside").mkdir()
    clip = write(tmp_path / "outside" / "a.ts", COUNTED)
    folder = tmp_path / "input"
    folder.mkdir()
    (folder / f"a{suffix}").write_text(PLAYLISTS[kind].format(path="../outside/a.ts"))
    monkeypatch.chdir(folder)
    refused("can't be decoded", folder / f"a{suffix}", call=load_video)
    assert len(load_video(clip).frames) == N  # which is one itself


def test_a_cover_picture_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.mp3"), "w") as container:
        sound = container.add_stream("mp3", rate=44100)
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic.value
        container.mux(cover.encode(av.VideoFrame.from_ndarray(COUNTED[3], format="rgb24")))
        container.mux(cover.encode())
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 44100), np.float32), "fltp", "stereo")
        frame.sample_rate = 44100
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    with av.open(str(tmp_path / "a.mp3")) as container:
        assert len(container.streams.video) == 1
    refused("has no video stream", tmp_path / "a.mp3", call=load_video)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files there")
def test_pipes_and_sockets_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    refused("is no file", tmp_path / "a.mp4", call=load_video)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(tmp_path / "b.mp4"))
        refused("is no file", tmp_path / "b.mp4", call=load_video)
    refused("is no file", "/dev/zero", call=load_video)
    images = tmp_path / "images"
    images.mkdir()
    os.mkfifo(images / "1.png")
    refused("1.png.* is no file", images, call=load_video)


def test_pictures_that_pillow_or_python_refuse(tmp_path, monkeypatch):
    for name in ("10.png", "²1.png", "٣.png", "2.png", "1" * 200 + ".png"):
        Image.fromarray(COUNTED[len(name) % N]).save(tmp_path / name)
    assert len(load_video(tmp_path).frames) == 5
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    refused("has more than 0 million pixels; make it smaller", tmp_path, call=load_video)
    refused("has more than 0 million pixels; make it smaller", tmp_path / "2.png", call=load_video)


def test_damaged_pictures_are_told(tmp_path):
    images = [Image.fromarray(picture) for picture in COUNTED[:4]]
    for suffix in ("png", "webp"):
        path = tmp_path / f"a.{suffix}"
        images[0].save(path, save_all=True, append_images=images[1:], duration=100, lossless=True)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * 2 // 3])
        refused(r"can't be read as an image|can't be decoded", path, call=load_video)


LEFT_EARLY = """
import sys, types
from pathlib import Path
package = sys.modules["tav_core"] = types.ModuleType("tav_core")  # without what it imports
package.__path__ = [sys.argv[1]]
import av
from tav_core.containers import video_footage
av.logging.set_level(av.logging.ERROR)
for _ in range(5):
    frames = video_footage(Path(sys.argv[2]), lambda event: None).frames(0)
    next(frames)
    frames.close()
"""


def test_a_damaged_video_that_is_left_early_does_not_hang(tmp_path):
    rng = np.random.default_rng(0)
    path = write(tmp_path / "a.ts", list(rng.integers(0, 256, (16, 240, 320, 3), np.uint8)), x264_params="keyint=8")
    content = bytearray(path.read_bytes())
    for place in rng.integers(len(content) // 3, len(content), 400):
        content[place] ^= 255
    path.write_bytes(content)
    # in a process of its own: what hangs holds Python's lock
    package = str(ROOT / "tav_core")
    subprocess.run([sys.executable, "-c", LEFT_EARLY, package, path], check=True, timeout=30, capture_output=True)


@pytest.mark.parametrize("path", ["a" * 300 + ".mp4", "a\0b.mp4", "loop.mp4", "a.mp4/b.mp4"])
def test_names_that_lead_nowhere(tmp_path, path):
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "a.mp4").write_bytes(b"")
    refused("does not exist|can't be read", tmp_path / path, call=load_video)


def test_a_stride_that_no_video_can_have_is_refused_before_anything_else(tmp_path):
    path = write(tmp_path / "a.mp4", COUNTED[:3])
    refused("stride=1000000 is out of range", path, stride=1_000_000, count=1, call=load_video)
    slow = write(tmp_path / "b.mkv", COUNTED[:3], rate=Fraction(1, 2))
    refused("makes 0.0005 frames a second", slow, stride=1000, count=1, call=load_video)
