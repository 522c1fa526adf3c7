"""The clips of the benchmark: of known content, what is edited in them, and in what ways."""

import random
from dataclasses import dataclass, replace

from . import world

KINDS = {"subject": "shape", "colour": "colour", "background": "background", "style": "style"}
REGIONS = {"subject": "shape", "colour": "subject", "background": "background", "style": "everything"}  # of a kind
ARMS = {
    "tuned": "the preset; the region that an edit may change is known",
    "no_region": "the same, but nobody knows where the subject is",
    "paper": "the paper's recipe in everything: 500 steps, guidance 12.5, 50 DDIM steps, no injection, no regions",
    "untuned": "the preset on the inflated model as it is, which also finds the subject",
    "random_noise": "the tuned model from Gaussian noise",
}


@dataclass(frozen=True)
class BenchmarkClip:
    """A clip of known content, and the scene's attribute that each kind of edit sets."""

    scene: world.Scene
    motion: str
    edits: dict[str, str]
    num_frames: int = 8

    @property
    def seen(self) -> bool:
        """Whether the checkpoint knows everything in it."""
        return (
            self.scene.pattern == "solid"
            and self.scene.shape in world.SHAPES
            and self.scene.background in world.BACKGROUNDS
        )

    def scenes(self, **changes: str) -> list[world.Scene]:
        return world.clip_scenes(replace(self.scene, **changes), self.motion, self.num_frames)

    def caption(self, **changes: str) -> str:
        return world.caption(replace(self.scene, **changes), self.motion)

    def contrasts(self) -> list[str]:
        """Its sentence with five other subjects."""
        colours = [c for c in world.COLOURS if c != self.scene.colour]
        return [
            self.caption(colour=c, shape=s) for c, s in zip(colours, (s for s in world.SHAPES if s != self.scene.shape))
        ]


def benchmark_clips(seed: int = 0) -> list[BenchmarkClip]:
    """Eight clips, four of them with content that the checkpoint has never seen."""
    known = [
        (world.Scene("ball", "red", "grass"), "slide"),
        (world.Scene("star", "yellow", "night"), "bounce"),
        (world.Scene("heart", "purple", "sand"), "circle"),
        (world.Scene("square", "green", "snow"), "grow"),
    ]
    unknown = [
        (world.Scene("ball", "blue", "sand", pattern="two-tone", second_colour="yellow"), "slide"),
        (world.Scene("cross", "green", "snow"), "bounce"),
        (world.Scene("star", "red", "checks", pattern="dots", second_colour="yellow"), "circle"),
        (world.Scene("moon", "orange", "hills", pattern="stripes", second_colour="purple"), "grow"),
    ]
    rng = random.Random(seed)
    clips = []
    for scene, motion in known + unknown:
        others = {
            "shape": [s for s in world.SHAPES if s != scene.shape],
            "colour": [c for c in world.COLOURS if c not in (scene.colour, scene.second_colour)],
            "background": [b for b in world.BACKGROUNDS if b != scene.background],
            "style": [s for s in world.STYLES if s != scene.style],
        }
        edits = {kind: rng.choice(others[attribute]) for kind, attribute in KINDS.items()}
        clips.append(BenchmarkClip(replace(scene, layout=rng.randrange(1 << 30)), motion, edits))
    return clips
