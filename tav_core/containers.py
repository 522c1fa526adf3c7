"""Clips that are video files: what is in them, when it is shown, and the frames from a wanted one on.

PyAV rather than OpenCV: it knows time stamps, reads gif and webm alike, and tells the rotation of phones. It is
imported where it is used: the method itself, and its benchmark on a rented GPU, don't need it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np

from .colours import Colours, display_matrix, to_rgb, to_sdr, turned
from .errors import TavError
from .events import Callback, Reading
from .timeline import FOLDER_FPS, Footage, Shown, Timeline, timeline_of

# what holds its video itself: no playlists, which would have other files read, no devices, no text
FORMATS = (
    "3g2,3gp,aac,amr,apng,asf,asf_o,av1,avi,dv,f4v,flac,flv,gif,h261,h263,h264,hevc,ivf,m4a,m4v,matroska,mj2,mjpeg,mov,"
    "mp3,mp4,mpeg,mpegts,mpegtsraw,mpegvideo,mxf,nsv,nut,obu,ogg,rm,vc1,vvc,w64,wav,webm,wtv,yuv4mpegpipe"
)
# what their files are called
VIDEOS = (
    ".3g2 .3gp .asf .avi .divx .dv .f4v .flv .gif .h264 .h265 .hevc .ivf .m1v .m2ts .m2v .m4v .mkv .mov .mp4 .mpeg "
    ".mpg .mts .mxf .nut .obu .ogv .qt .ts .vob .webm .wmv .y4m"
).split()
CONVERT = "if it is a video, convert it to mp4 again"
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # decoders that don't leave it out
ODDEST = 10  # width to height of a pixel, or height to width; more is a mistake


@contextmanager
def opened(path: Path) -> Iterator:
    """The container of a file.

    Raises:
        TavError: whatever goes wrong while it is read.
    """
    import av

    try:
        # "file:", because a name like 12:30.mp4 would be one of a protocol
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
        with av.open(f"file:{path}", container_options=options, metadata_errors="replace") as container:
            try:
                yield container
            finally:
                # a decoder that is closed waits for its threads, and these, to log what is damaged, for this one
                for stream in container.streams:
                    if stream.codec_context:
                        stream.codec_context.flush_buffers()
    except TavError:
        raise
    except (av.FFmpegError, OSError, IndexError, ValueError) as error:  # PyAV has the latter two for odd streams
        reason = getattr(error, "strerror", None) or str(error)
        raise TavError("video", path, f"can't be decoded ({reason})", CONVERT) from error


@dataclass(frozen=True)
class _Scan:
    """What is known of a video before it is decoded.

    Attributes:
        line: None if its frames have no time stamps.
        in_order: whether the stamps of the line go to the frames one by one, because frames don't tell their own.
        keys: stamps of presentation and of decoding of the frames that decoding can begin at, in their order.
        rate: that of the line, or the one that it names.
        begin: seconds at which its first frame is shown.
        aspect: width to height of a pixel.
        colours: those that it names.
        cut_off: whether its end is missing.
    """

    line: Timeline | None
    in_order: bool
    keys: list[tuple[int, int]]
    rate: Fraction
    begin: float
    aspect: float
    colours: Colours
    cut_off: bool


def video_footage(path: Path, callback: Callback) -> Footage:
    """The first video of a file.

    Args:
        callback: gets a `Reading` for every packet and frame that is looked at.

    Raises:
        TavError: not a video, or, when it is decoded, a damaged one.
    """
    with opened(path) as container:
        scan = _scan(container, path, callback)

    def frames(start: int) -> Iterator[Shown]:
        if scan.line is None:
            decoded = ((number, number + 1, frame) for number, frame in enumerate(_decoded(path, None, 0, callback)))
        else:
            decoded = _numbered(path, scan, start, callback)
        for number, until, frame in decoded:
            if until > start:
                yield number, until, partial(_pixels, frame, scan)
        if scan.cut_off:
            raise TavError("video", path, "is cut off, its last frames are missing", "copy it again")

    finish = partial(to_sdr, colours=scan.colours) if scan.colours.other else np.ascontiguousarray
    total = None if scan.line is None or scan.cut_off else scan.line.total
    return Footage(scan.rate, total, frames, finish, scan.begin)


def _stream(container, path: Path):
    """The first video that isn't the cover picture of a song."""
    import av

    cover = av.stream.Disposition.attached_pic
    for stream in container.streams.video:
        if not stream.disposition & cover:
            if stream.codec_context is None:
                raise TavError("video", path, "is coded in a way that is not known here", CONVERT)
            return stream
    raise TavError("video", path, "has no video stream", "give an mp4, webm or gif file or a folder of images")


def _decoder(stream):
    import av

    name = stream.codec_context.name
    tagged = {key.lower(): value for key, value in stream.metadata.items()}
    if tagged.get("alpha_mode") == "1" and name in WITH_ALPHA:
        decoder = av.CodecContext.create(WITH_ALPHA[name], "r")
        decoder.extradata = stream.codec_context.extradata
        return decoder
    return stream.codec_context


def _scan(container, path: Path, callback: Callback) -> _Scan:
    """Reads all packets, and decodes as many as the first frame takes."""
    stream = _stream(container, path)
    decoder, first = _decoder(stream), None
    in_order = container.format.name == "avi"  # which says when frames are decoded, and that some are left out
    packets, damaged = [], False
    for number, packet in enumerate(container.demux(stream), 1):
        callback(Reading(number))
        if first is None and (frames := decoder.decode(packet)):
            first = frames[0]
        damaged = packet.is_corrupt if packet.size else damaged
        if packet.size and not packet.is_discard:
            shown = packet.dts if in_order else packet.pts
            packets.append((shown, packet.dts, packet.duration or 0, packet.is_keyframe))
    stamped = sorted((packet for packet in packets if packet[0] is not None), key=itemgetter(0))
    begin = None if first is None else stamped[0][0] if in_order and stamped else first.pts
    stamped = [packet for packet in stamped if begin is not None and packet[0] >= begin]  # no others can be decoded
    aspect = float(stream.sample_aspect_ratio or 1)
    declared = [stream.average_rate, stream.base_rate, stream.guessed_rate]
    line = None
    if 2 * len(stamped) > len(packets):
        last = stamped[-1]
        line = timeline_of([packet[0] for packet in stamped], last[0] + last[2], stream.time_base, declared)
    return _Scan(
        line,
        in_order,
        [] if in_order else [(pts, pts if dts is None else dts) for pts, dts, _, key in stamped if key],
        line.rate if line else next((rate for rate in declared if rate), Fraction(FOLDER_FPS)),
        float((begin or 0) * stream.time_base),
        aspect if 1 / ODDEST <= aspect <= ODDEST else 1.0,
        Colours(int(stream.codec_context.color_trc or 0), int(stream.codec_context.color_primaries or 0)),
        _is_cut_off(stream, path) or container.format.name.startswith("mov") and damaged,
    )


def _is_cut_off(stream, path: Path) -> bool:
    """Of mp4, from PyAV 17 on: the decoder takes a missing rest for the end. Earlier ones see half a packet at most."""
    index = getattr(stream, "index_entries", ())
    return len(index) > 0 and index[len(index) - 1].pos + index[len(index) - 1].size > path.stat().st_size


def _decoded(path: Path, key: int | None, target: int, callback: Callback) -> Iterator:
    """All frames, or, where there is the stamp of a key frame, those from it or an earlier one on.

    None if the file can't be entered there.

    Args:
        target: the stamp to seek, for a key frame.
    """
    import av

    with opened(path) as container:
        stream = _stream(container, path)
        stream.thread_type = "AUTO"
        if key is not None:
            try:
                container.seek(target, stream=stream)
            except av.FFmpegError:
                return
        decoder, entered, number = _decoder(stream), key is None, 0
        for packet in container.demux(stream):
            if not entered:
                if not packet.is_keyframe:
                    continue
                if packet.pts is None or packet.pts > key:
                    return
                entered = True
            for frame in decoder.decode(packet):
                callback(Reading(number := number + 1))
                yield frame


def _numbered(path: Path, scan: _Scan, start: int, callback: Callback) -> Iterator[tuple[int, int, object]]:
    """The frames with the numbers between which they are shown, from the last key frame before `start` on or earlier.

    Decoding begins at the beginning where a file can't be entered exactly.
    """
    line = scan.line
    wanted = line.stamp_at(start)
    earlier = [stamps for stamps in scan.keys if line.stamps[0] < stamps[0] <= wanted][-1:]
    # files are entered by the one stamp or by the other
    for key, target in [(pts, stamp) for pts, dts in earlier for stamp in sorted({pts, dts}, reverse=True)] + [
        (None, 0)
    ]:
        place, previous, repeated = -1, None, 0
        for frame in _decoded(path, key, target, callback):
            if place < 0 and key is not None and frame.pts != key:
                if frame.pts is None or frame.pts > key:
                    break
                continue  # of an open group of pictures, whose first half is not there
            if scan.in_order or frame.pts is None:
                place = min(place + 1, len(line.stamps) - 1)
            else:
                repeated = repeated + 1 if frame.pts == previous else 0
                place, previous = line.place(frame.pts, repeated), frame.pts
            yield line.numbers[place], line.numbers[place + 1], frame
        if place >= 0:
            return


def _pixels(frame, scan: _Scan) -> tuple[np.ndarray, float]:
    return to_rgb(frame, scan.colours), 1 / scan.aspect if turned(display_matrix(frame)) else scan.aspect
