"""From decoded frames to the pixels that a player shows: upright, over black, in the colours of sRGB screens."""

from dataclasses import dataclass

import numpy as np

from .errors import TavError

# ITU-T H.273, which all containers and codecs number colours by
UNSPECIFIED, MPEG, JPEG = 2, 1, 2
MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}  # to those that swscale has
RGB, FCC = 0, 4
PQ, HLG = 16, 18
BT2020, P3 = (9,), (11, 12)
# linear RGB of BT.2020 and of Display P3 to that of BT.709
FROM_BT2020 = np.float32(
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008350], [-0.018151, -0.100579, 1.118730]]
)
FROM_P3 = np.float32([[1.224940, -0.224940, 0], [-0.042057, 1.042057, 0], [-0.019638, -0.078636, 1.098274]])
LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)  # of linear BT.2020
GAMMA = 2.4  # of SDR screens (BT.1886)
BRIGHTEST, WHITE = 1000.0, 203.0  # cd/m2: of HDR masters, and of the white of SDR beside them (BT.2408)


@dataclass(frozen=True)
class Colours:
    """What a stream says of its colours: numbers of transfer characteristics and primaries."""

    transfer: int
    primaries: int

    @property
    def other(self) -> bool:
        """Whether its RGB isn't that of an SDR screen."""
        return self.transfer in (PQ, HLG) or self.primaries in (*BT2020, *P3)


def to_rgb(frame, colours: Colours) -> np.ndarray:
    """The pixels `h w 3` of an `av.VideoFrame`, upright: uint8, or uint16 for `to_sdr` where colours are other ones.

    Raises:
        TavError: a matrix that can't be undone.
    """
    alpha = any(component.is_alpha for component in frame.format.components) or frame.format.has_palette
    if colours.other:
        name = "rgba64le" if alpha else "rgb48le"
    else:
        name = "rgba" if alpha else "rgb24"
    pixels = frame.reformat(format=name, **_matrix(frame)).to_ndarray()
    if alpha:
        most = np.iinfo(pixels.dtype).max
        opaque = pixels[..., 3:].astype(np.uint32)
        pixels = ((pixels[..., :3] * opaque + most // 2) // most).astype(pixels.dtype)
    return upright(pixels, display_matrix(frame))


def _matrix(frame) -> dict[str, int]:
    """How a frame becomes RGB, for `reformat`."""
    if frame.format.is_rgb or frame.format.has_palette:
        return {}
    matrix, name = int(frame.colorspace), frame.format.name
    if matrix in (UNSPECIFIED, RGB, 3):  # as players guess
        matrix = 1 if frame.height > 576 or frame.width >= 1280 else 5
    if matrix not in MATRICES:
        problem = f"has colours in a form (matrix {matrix} of H.273) that can't be read"
        raise TavError("video", None, problem, "convert it to BT.709")
    full = int(frame.color_range) == JPEG or name.startswith("yuvj")
    full = full or name.startswith(("gray", "ya")) and int(frame.color_range) != MPEG
    # PyAV leaves the matrix as it is where the two are the same, whatever it was; RGB doesn't care for the second
    other = FCC if MATRICES[matrix] != FCC else 1
    return {"src_colorspace": MATRICES[matrix], "dst_colorspace": other,
            "src_color_range": JPEG if full else MPEG, "dst_color_range": JPEG}  # fmt: skip


def display_matrix(frame) -> np.ndarray | None:
    """How the frame is to be turned and mirrored: 3x3 of fixed-point numbers, if it says so."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            return np.frombuffer(bytes(data), np.int32).reshape(3, 3)
    return None


def turned(matrix: np.ndarray | None) -> bool:
    """Whether width and height change places."""
    return matrix is not None and abs(int(matrix[0, 1])) > abs(int(matrix[0, 0]))


def upright(pixels: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """The pixels `h w c` as the matrix shows them: x y becomes x*a + y*c, x*b + y*d."""
    if matrix is None:
        return pixels
    (a, b), (c, d) = matrix[:2, :2]
    if turned(matrix):
        pixels, across, down = pixels.transpose(1, 0, 2), c, b
    else:
        across, down = a, d
    return pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]


def to_sdr(pixels: np.ndarray, colours: Colours) -> np.ndarray:
    """uint16 RGB `h w 3` of HDR (PQ, HLG) or of a wide gamut, to uint8 of BT.709 as an SDR screen shows it.

    The light of HDR is compressed by the curve of BT.2390 (5.4) to what BT.2408 gives SDR.
    """
    light = pixels.astype(np.float32) / 65535
    if colours.transfer == HLG:
        light = _hlg_light(light)
    elif colours.transfer == PQ:
        light = _pq_light(light)
    else:
        light = light**GAMMA
    if colours.transfer in (PQ, HLG):
        brightest = light.max(-1, keepdims=True)
        light = light * (_compressed(brightest) / np.maximum(brightest, 1e-6)) / WHITE
    light = light @ (FROM_P3 if colours.primaries in P3 else FROM_BT2020).T
    return (light.clip(0, 1) ** (1 / GAMMA) * 255).round().astype(np.uint8)


def _hlg_light(signal: np.ndarray) -> np.ndarray:
    """HLG (BT.2100) to cd/m2 on a screen of 1000."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    return BRIGHTEST * scene * np.maximum(scene @ LUMINANCE, 1e-6)[..., None] ** 0.2


M1, M2, C1, C2, C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128  # of SMPTE ST 2084


def _pq_light(signal: np.ndarray) -> np.ndarray:
    """PQ to cd/m2."""
    root = signal ** (1 / M2)
    return 10000 * (np.maximum(root - C1, 0) / (C2 - C3 * root)) ** (1 / M1)


def _pq(light: np.ndarray) -> np.ndarray:
    """cd/m2 to PQ."""
    root = (np.maximum(light, 0) / 10000) ** M1
    return ((C1 + C2 * root) / (1 + C3 * root)) ** M2


def _compressed(light: np.ndarray) -> np.ndarray:
    """cd/m2 up to those of an HDR master, to those of SDR: as they are below a knee, rolled off above it."""
    top = _pq(np.float32(BRIGHTEST))
    most = _pq(np.float32(WHITE)) / top
    knee = 1.5 * most - 0.5
    value = np.minimum(_pq(light) / top, 1)
    t = np.maximum(value - knee, 0) / (1 - knee)
    rolled = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * most
    return _pq_light(np.where(value < knee, value, rolled) * top)
