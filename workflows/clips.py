"""21 to 23: clips that are long, several takes of a motion, and many clips at once."""

from tav_core.mini.demo import PROMPT
from workflows.graph import Workflow
from workflows.parts import (
    EDIT,
    Source,
    injected,
    inverted,
    load_checkpoint,
    nothing,
    read_me,
    result,
    sampled,
    saved,
    sentence,
    sentences,
    source,
    tuning,
)

FOLDER = "demo clips of the mini checkpoint"


def long_clip(w: Workflow, name: str):
    read_me(
        w,
        """# Long clips

The graph of 01 with one node more: *Context Windows*, between *Inflate* and *One-Shot Tune*.

The clip is looked at in overlapping windows, here of 6 frames, in the memory of 6. Each step of the tuning learns another window; inversion and sampling blend what they draw where windows overlap, so that no seam shows.

With a clip of your own: set *count* of *Load Video* to 60, 120 or what you like, *context_length* to 8 or 16 and *context_overlap* to half of it or less. More *steps* suit a longer clip.
""",
        380,
    )
    start = source(w)
    start.model = w.add("TAVContextWindows", model=start.model, context_length=6, context_overlap=3)
    described, edit, empty = sentences(w, start.text)
    tuned = tuning(w, start, described, edit)
    noise = inverted(w, tuned.MODEL, start, described, measure=False)
    w.group("5  Edit", "cyan")
    frames = sampled(w, injected(w, tuned.MODEL, described), edit, empty, noise, start.vae)
    result(w, name, start.clip, [start.clip.images, frames], ["source", EDIT], {"edit": frames})


def two_takes(w: Workflow, name: str):
    read_me(
        w,
        """# Two takes

One tuning learns from two clips: *Take* holds the second with its own sentence, and more of these nodes make a chain. Here the second take is the mirrored first one, so that what is learned is the subject, not its way from left to right; with clips of your own it is the motion that they share.

Each take can be edited afterwards. Here it is the second: it is inverted and sampled.
""",
        300,
    )
    start = source(w)
    w.group("2b  Second take", "blue", below=True)
    mirrored = w.add("ImageFlip", image=start.clip.images, flip_method="y-axis: horizontally")
    second = w.add("VAEEncode", pixels=mirrored, vae=start.vae)
    w.group("2c  Sentences", "green")
    described = sentence(w, start.text, "What the first clip shows", PROMPT)
    also = sentence(w, start.text, "What the second clip shows", PROMPT)
    edit = sentence(w, start.text, "What the second should show", EDIT)
    empty = nothing(w, start.text)
    takes = w.add("TAVTake", latent=second, positive=also)
    tuned = tuning(w, start, described, edit, takes=takes)
    start.latent = second
    noise = inverted(w, tuned.MODEL, start, also, measure=False, title="4  Invert the second")
    w.group("5  Edit it", "cyan")
    frames = sampled(w, injected(w, tuned.MODEL, also), edit, empty, noise, start.vae)
    result(w, name, start.clip, [mirrored, frames], ["second take", EDIT], {"edit": frames})


def batch(w: Workflow, name: str):
    read_me(
        w,
        """# Many clips

*Load Video Folder* loads all clips of a folder, here two that ship with the pack. Its outputs are lists, so that **each node runs once for each clip**: it is tuned, inverted, edited and saved under its own name.

For your clips: put them into a folder in ComfyUI's `input`, press **R**, and choose it. Beside each clip lies a `.txt` of the same name, with two lines:

1. what the clip shows,
2. what it should show.

Clips without one take the lines of *sentences*, in the order of their names: `what it shows; what it should show`.

One node runs for all clips before the next one does, so all of them, and what was tuned on each, are in memory together. For dozens of clips use `tune-a-video evaluate`, which takes them one by one and goes on where it stopped.
""",
        560,
    )
    w.group("1a  Clips", "blue")
    clips = w.add("TAVLoadVideoFolder", folder=FOLDER, count=8, width=128, height=128)
    checkpoint = load_checkpoint(w)
    w.group("2a  Inflate and encode", "blue")
    inflated = w.add("TAVInflate", model=checkpoint.MODEL)
    latent = w.add("VAEEncode", pixels=clips.images, vae=checkpoint.VAE)
    start = Source(clips, inflated, checkpoint.CLIP, checkpoint.VAE, latent)
    w.group("2b  Sentences of each clip", "green", below=True)
    described = sentence(w, start.text, "What it shows", clips.prompt)
    edit = sentence(w, start.text, "What it should show", clips.edit)
    empty = nothing(w, start.text)
    tuned = tuning(w, start, described, edit)
    noise = inverted(w, tuned.MODEL, start, described, measure=False)
    w.group("5  Edit", "cyan")
    frames = sampled(w, injected(w, tuned.MODEL, described), edit, empty, noise, start.vae)
    w.group("6  Compare and save", "pale_blue", 400)
    compare = w.add("TAVCompare", images_1=clips.images, images_2=frames, labels="source\nedit")
    compared = w.add("StringConcatenate", title="Name", string_a=f"video/{name}", string_b=clips.name, delimiter="-")
    saved(w, compare.video, clips, compared)
    w.group("Frames", "pale_blue", below=True)
    w.add("PreviewImage", title="Frames", images=compare.strip)
    w.group("7  Saved alone", "pale_blue", 400)
    alone = w.add("StringConcatenate", title="Name", string_a=f"video/{name}-edit", string_b=clips.name, delimiter="-")
    saved(w, frames, clips, alone)
