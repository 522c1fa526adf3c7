"""The rendered world of the mini checkpoint: one subject (shape x colour) on a background, in a style.

Everything is a pure function of a `Scene`, so the exact picture that an edit should give is always known.
Lengths are fractions of the picture's side, angles are degrees, colours are RGB in 0..255.
"""

import math
import random
from dataclasses import dataclass, replace

import cv2
import numpy as np

SIZE = 128  # pixels a side
SUPERSAMPLE = 4  # masks are drawn this much larger and averaged down

COLOURS = {
    "red": (222, 38, 44),
    "orange": (250, 138, 24),
    "yellow": (252, 222, 46),
    "green": (44, 168, 72),
    "blue": (40, 92, 226),
    "purple": (152, 60, 196),
}
BACKGROUNDS = {  # name -> how a caption says where the subject is
    "grass": "on the grass",
    "sand": "on the sand",
    "sea": "on the sea",
    "snow": "on the snow",
    "night": "in the night",
    "wall": "at the wall",
}
STYLES = ("plain", "cartoon", "pixel art", "sketch")
MOTIONS = {"slide": "sliding", "bounce": "bouncing", "grow": "growing", "turn": "turning", "circle": "circling"}
PATTERNS = ("solid", "two-tone", "stripes", "dots")  # only "solid" is in the training set


def _regular(points: int, inner: float | None = None, phase: float = -90.0) -> np.ndarray:
    """A regular polygon, or a star when every second corner lies at radius `inner`."""
    count = points if inner is None else 2 * points
    angles = np.radians(phase + 360.0 / count * np.arange(count))
    radii = np.ones(count)
    if inner is not None:
        radii[1::2] = inner
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - 2], 1) / 16


def _cross(arm: float = 0.36) -> np.ndarray:
    a = arm
    return np.array(
        [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)],
        float,
    )


def _moon() -> np.ndarray:
    """A crescent: the unit circle less a circle of the same size moved to the right by 0.7."""
    corner = math.degrees(math.acos(0.35))
    outer = np.radians(np.linspace(corner, 360 - corner, 48))
    inner = np.radians(np.linspace(180 + corner, 180 - corner, 40))
    arc = np.stack([0.7 + np.cos(inner), np.sin(inner)], 1)
    return np.concatenate([np.stack([np.cos(outer), np.sin(outer)], 1), arc]) + (0.15, 0.0)


# Contours in a box of about -1..1; a second contour is a hole.
SHAPES = {
    "ball": [_regular(64)],
    "square": [_regular(4, phase=-45.0) * 1.2],
    "star": [_regular(5, inner=0.42) * 1.15],
    "heart": [_heart()],
    "triangle": [_regular(3) * 1.2],
    "ring": [_regular(64), _regular(64) * 0.52],
}
UNKNOWN_SHAPES = {"cross": [_cross()], "moon": [_moon()]}
UNKNOWN_BACKGROUNDS = {"checks": "on the checks", "hills": "in the hills"}
UNKNOWN_STYLES = ("neon",)  # of the LoRA
NEON_NIGHT = (22, 26, 62)


@dataclass(frozen=True)
class Scene:
    """One picture. `x`, `y`, `radius` are fractions of the side; `layout` seeds the background's details."""

    shape: str = "ball"
    colour: str = "red"
    background: str = "grass"
    style: str = "plain"
    x: float = 0.5
    y: float = 0.5
    radius: float = 0.24
    angle: float = 0.0
    layout: int = 0
    pattern: str = "solid"
    second_colour: str = "yellow"


def combinations() -> list[tuple[str, str, str, str]]:
    """All (shape, colour, background, style) of the world, in a fixed order."""
    return [(s, c, b, t) for s in SHAPES for c in COLOURS for b in BACKGROUNDS for t in STYLES]


def held_out() -> set[tuple[str, str, str, str]]:
    """The tenth of the combinations that is never rendered for training."""
    every = combinations()
    return set(random.Random(2212).sample(every, len(every) // 10))


def caption(scene: Scene, motion: str | None = None) -> str:
    """The sentence of a scene: "a red star is sliding on the sand, sketch style"."""
    where = {**BACKGROUNDS, **UNKNOWN_BACKGROUNDS}[scene.background]
    verb = f" is {MOTIONS[motion]}" if motion else ""
    article = "an" if scene.colour[0] in "aeiou" else "a"
    style = "" if scene.style == "plain" else f", {scene.style} style"
    return f"{article} {scene.colour} {scene.shape}{verb} {where}{style}"


def random_scene(rng: random.Random, combination: tuple[str, str, str, str] | None = None) -> Scene:
    """A scene with random place, size, angle and layout; the whole subject stays inside the picture."""
    shape, colour, background, style = combination or rng.choice(combinations())
    radius = rng.uniform(0.16, 0.31)
    margin = radius * 1.2
    angle = rng.uniform(-25, 25) if rng.random() < 0.6 else rng.uniform(-180, 180)
    return Scene(
        shape,
        colour,
        background,
        style,
        x=rng.uniform(margin, 1 - margin),
        y=rng.uniform(margin, 1 - margin),
        radius=radius,
        angle=angle,
        layout=rng.randrange(1 << 30),
    )


def clip_scenes(scene: Scene, motion: str, num_frames: int) -> list[Scene]:
    """The scenes of a clip with known motion: slide, bounce, grow, turn or circle, 2 or more frames."""
    scenes = []
    for i in range(num_frames):
        u = i / (num_frames - 1)  # 0..1
        if motion == "slide":
            change = dict(x=0.28 + 0.44 * u, y=scene.y + 0.06 * math.sin(2 * math.pi * u))
        elif motion == "bounce":
            change = dict(x=0.30 + 0.40 * u, y=0.68 - 0.36 * abs(math.sin(2 * math.pi * u)))
        elif motion == "grow":
            change = dict(radius=0.15 + 0.16 * u)
        elif motion == "turn":
            change = dict(angle=scene.angle + 120 * u)
        elif motion == "circle":
            turn = 2 * math.pi * u * (num_frames - 1) / num_frames
            change = dict(x=0.5 + 0.2 * math.cos(turn), y=0.5 + 0.2 * math.sin(turn))
        else:
            raise ValueError(f"motion is {motion!r}; choose one of {', '.join(MOTIONS)}")
        scenes.append(replace(scene, **change))
    return scenes


# ---------------------------------------------------------------------------------------------- drawing


def _contours(scene: Scene, scale: float) -> list[np.ndarray]:
    """The subject's outline in pixels at `scale` pixels a side."""
    turn = math.radians(scene.angle)
    rotate = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    shape = {**SHAPES, **UNKNOWN_SHAPES}[scene.shape]
    return [((c * scene.radius) @ rotate + (scene.x, scene.y)) * scale for c in shape]


def _fixed(points: np.ndarray) -> np.ndarray:
    return np.round(points * 16).astype(np.int32)  # cv2's sub-pixel positions, shift=4


def subject_mask(scene: Scene, size: int = SIZE) -> np.ndarray:
    """Coverage of the subject, float32 `h w` in 0..1."""
    large = np.zeros((size * SUPERSAMPLE, size * SUPERSAMPLE), np.uint8)
    cv2.fillPoly(large, [_fixed(c) for c in _contours(scene, size * SUPERSAMPLE)], 255, shift=4)
    return cv2.resize(large, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _outline(scene: Scene, size: int, width: float) -> np.ndarray:
    """Coverage of a line of `width` (fraction of the side) along the outline, float32 `h w` in 0..1."""
    large = np.zeros((size * SUPERSAMPLE, size * SUPERSAMPLE), np.uint8)
    thickness = max(1, round(width * size * SUPERSAMPLE))
    cv2.polylines(large, [_fixed(c) for c in _contours(scene, size * SUPERSAMPLE)], True, 255, thickness, shift=4)
    return cv2.resize(large, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _over(image: np.ndarray, colour, alpha: np.ndarray) -> np.ndarray:
    return image + (np.asarray(colour, np.float32) - image) * alpha[..., None]


def _soft_step(distance: np.ndarray, size: int) -> np.ndarray:
    """1 where `distance` (fraction of the side) is positive, with an edge one pixel wide."""
    return np.clip(distance * size + 0.5, 0, 1)


def _background(name: str, layout: int, size: int) -> np.ndarray:
    """The empty stage, float32 `h w 3` in 0..255. `layout` moves horizon, waves, stars and bricks."""
    rng = np.random.default_rng(layout)
    y, x = (np.mgrid[0:size, 0:size].astype(np.float32) + 0.5) / size
    horizon = rng.uniform(0.30, 0.48)
    phase = rng.uniform(0, 1)

    def stage(top, low, edge):  # sky above, ground below
        sky = np.broadcast_to(np.asarray(top, np.float32), (size, size, 3))
        return _over(sky, low, _soft_step(y - edge, size))

    if name == "grass":
        image = stage((178, 216, 240), (122, 176, 104), horizon + 0.015 * np.sin(2 * np.pi * (x + phase)))
        blades = _soft_step(0.014 - np.abs(((x + phase + 0.25 * y) * 9 % 1) - 0.5) / 9, size)
        rows = _soft_step(0.030 - np.abs((((y - horizon) * 7) % 1) - 0.5) / 7, size)
        return _over(image, (92, 146, 80), blades * rows * _soft_step(y - horizon - 0.03, size))
    if name == "sand":
        image = stage((250, 232, 208), (226, 196, 150), horizon + 0.04 * np.sin(2 * np.pi * (1.2 * x + phase)))
        ripple = np.sin(2 * np.pi * (y * 7 + 0.35 * np.sin(2 * np.pi * (x + phase))))
        return _over(
            image, (206, 172, 124), _soft_step(ripple * 0.02 - 0.012, size) * _soft_step(y - horizon - 0.06, size)
        )
    if name == "sea":
        image = stage((214, 232, 240), (96, 170, 190), np.full_like(x, horizon))
        crest = np.sin(2 * np.pi * (y * 8 + 0.22 * np.sin(2 * np.pi * (2 * x + phase))))
        return _over(
            image, (190, 226, 232), _soft_step(crest * 0.02 - 0.014, size) * _soft_step(y - horizon - 0.02, size)
        )
    if name == "snow":
        image = stage((186, 200, 220), (246, 248, 252), horizon + 0.07 * np.abs(((1.5 * x + phase) % 1) * 2 - 1) - 0.03)
        drift = np.sin(2 * np.pi * (y * 5 + 0.5 * np.sin(2 * np.pi * (0.8 * x + phase))))
        return _over(
            image, (214, 224, 238), _soft_step(drift * 0.03 - 0.02, size) * _soft_step(y - horizon - 0.1, size)
        )
    if name == "night":
        image = _over(np.full((size, size, 3), (22, 26, 62), np.float32), (44, 46, 92), np.clip(y * 1.2 - 0.2, 0, 1))
        for sx, sy in rng.uniform(0.04, 0.96, (14, 2)):
            image = _over(image, (250, 246, 214), _soft_step(0.013 - np.hypot(x - sx, y - sy), size))
        return _over(image, (14, 16, 36), _soft_step(y - 0.90 + 0.03 * np.sin(2 * np.pi * (2 * x + phase)), size))
    if name == "wall":
        down, across = y * 8 + phase, x * 4 + phase
        across = across + 0.5 * (np.floor(down) % 2)
        mortar = np.maximum(
            _soft_step(0.008 - np.abs((down + 0.5) % 1 - 0.5) / 8, size),
            _soft_step(0.008 - np.abs((across + 0.5) % 1 - 0.5) / 4, size),
        )
        return _over(np.full((size, size, 3), (158, 122, 110), np.float32), (208, 192, 182), mortar)
    if name == "checks":  # unknown to the checkpoint
        checks = (np.floor((x + phase / 4) * 6) + np.floor((y + phase / 4) * 6)) % 2
        return _over(np.full((size, size, 3), (236, 232, 222), np.float32), (92, 104, 112), checks)
    if name == "hills":  # unknown to the checkpoint
        image = np.full((size, size, 3), (252, 206, 176), np.float32)
        for k, tone in enumerate(((190, 150, 176), (132, 118, 160), (84, 92, 128))):
            edge = 0.36 + 0.2 * k + 0.07 * np.sin(2 * np.pi * ((1 + 0.4 * k) * x + phase + 0.3 * k))
            image = _over(image, tone, _soft_step(y - edge, size))
        return image
    raise ValueError(f"background is {name!r}; choose one of {', '.join([*BACKGROUNDS, *UNKNOWN_BACKGROUNDS])}")


def _paint(scene: Scene, size: int) -> np.ndarray:
    """The subject's own colours before masking, `h w 3`: solid, or a pattern that turns with the subject."""
    first = np.broadcast_to(np.asarray(COLOURS[scene.colour], np.float32), (size, size, 3))
    if scene.pattern == "solid":
        return first
    y, x = (np.mgrid[0:size, 0:size].astype(np.float32) + 0.5) / size
    turn = math.radians(scene.angle)
    u = ((x - scene.x) * math.cos(turn) + (y - scene.y) * math.sin(turn)) / scene.radius
    v = (-(x - scene.x) * math.sin(turn) + (y - scene.y) * math.cos(turn)) / scene.radius
    if scene.pattern == "two-tone":
        where = v * scene.radius
    elif scene.pattern == "stripes":
        where = np.sin(u * 2 * math.pi) * 0.25 * scene.radius
    elif scene.pattern == "dots":
        where = (0.24 - np.hypot((u * 1.25 + 0.5) % 1 - 0.5, (v * 1.25 + 0.5) % 1 - 0.5)) * scene.radius
    else:
        raise ValueError(f"pattern is {scene.pattern!r}; choose one of {', '.join(PATTERNS)}")
    return _over(first, COLOURS[scene.second_colour], _soft_step(where, size))


def render(scene: Scene, size: int = SIZE) -> np.ndarray:
    """Draws a scene.

    Returns: uint8 `h w 3` RGB, `size` x `size` pixels.
    """
    stage = _background(scene.background, scene.layout, size)
    mask = subject_mask(scene, size)
    paint = _paint(scene, size)
    if scene.style == "plain":
        image = _over(stage, paint, mask)
    elif scene.style == "cartoon":  # flat bright stage, thick ink
        stage = 255 - (255 - stage) * 0.62 if scene.background != "night" else stage
        image = _over(_over(stage, paint, mask), (16, 14, 20), _outline(scene, size, 0.042))
    elif scene.style == "pixel art":  # blocks of 4 px at 128 px, four levels a channel
        image = _over(stage, paint, mask)
        blocks = cv2.resize(image, (size // 4, size // 4), interpolation=cv2.INTER_AREA)
        blocks = np.round(blocks / 85) * 85
        image = cv2.resize(blocks, (size, size), interpolation=cv2.INTER_NEAREST)
    elif scene.style == "sketch":  # pale pencil on paper, the subject hatched with a crayon
        pencil = 0.7 * stage.mean(-1, keepdims=True) + 0.3 * stage
        image = np.float32((250, 247, 240)) * 0.2 + (110 + 0.57 * pencil) * 0.8
        y, x = (np.mgrid[0:size, 0:size].astype(np.float32) + 0.5) / size
        hatch = _soft_step(0.017 - np.abs(((x + y) * 14 % 1) - 0.5) / 14 / math.sqrt(2), size)
        pale = 255 - (255 - paint) * 0.45
        image = _over(image, pale, mask)
        image = image + (paint - image) * (mask * hatch)[..., None]
        image = _over(image, (70, 66, 70), _outline(scene, size, 0.018))
    elif (
        scene.style == "neon"
    ):  # glowing tubes in the night: the subject's outline in its colour, the stage's edges faint
        light = cv2.GaussianBlur(stage.mean(-1), (0, 0), 0.006 * size)
        edges = np.clip(np.hypot(*np.gradient(light)) * size / 2000 - 0.1, 0, 1)
        image = _over(np.full_like(stage, NEON_NIGHT), (84, 84, 150), edges)
        tube = _outline(scene, size, 0.05)
        glow = np.clip(2 * cv2.GaussianBlur(tube, (0, 0), 0.03 * size), 0, 1)
        image = _over(_over(image, NEON_NIGHT, mask), paint, 0.4 * glow)
        image = _over(image, paint, tube)
    else:
        raise ValueError(f"style is {scene.style!r}; choose one of {', '.join([*STYLES, *UNKNOWN_STYLES])}")
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def render_clip(scenes: list[Scene], size: int = SIZE) -> np.ndarray:
    """Draws the scenes of a clip: uint8 `f h w 3`."""
    return np.stack([render(scene, size) for scene in scenes])


def silhouette_clip(scenes: list[Scene], size: int = SIZE) -> np.ndarray:
    """The subjects of the scenes, white on black: uint8 `f h w 3`."""
    masks = np.stack([subject_mask(scene, size) for scene in scenes])
    return np.repeat(np.round(masks * 255).astype(np.uint8)[..., None], 3, -1)
