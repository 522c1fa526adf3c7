"""What several workflows have: the clip and the checkpoint, sentences, tuning, sampling, and what is saved."""

from dataclasses import dataclass

from tav_core.mini.demo import CONTRASTS, EDITS, PROMPT
from workflows.graph import Node, Workflow

DEMO = "demo clip of the mini checkpoint"
EDIT = EDITS["background"]
SAVED = "demo-clip"  # the name under which 02 saves and 04 loads
OWN = "my-clip"  # and 03 and 05
MINI_STEPS, PAPER_STEPS = 25, 50
SAMPLING = {True: dict(steps=MINI_STEPS, cfg=5.0), False: dict(steps=PAPER_STEPS, cfg=12.5)}  # by whether it is mini
TUNING = {
    True: dict(steps=200, learning_rate=0.002, timestep_sampling="stratified", preview_every=50),
    False: dict(steps=500, learning_rate=3e-5, preview_every=100),
}
CLIP = {True: dict(file=DEMO, count=8, width=128, height=128), False: dict(file="skiing.mp4", stride=2, count=16)}


@dataclass
class Source:
    """The clip, the inflated MODEL, CLIP, VAE, and the LATENT of the clip; each a node or its output."""

    clip: Node
    model: Node | tuple
    text: Node | tuple
    vae: Node | tuple
    latent: Node


def read_me(w: Workflow, text: str, height: int):
    w.group("Read me", "yellow", 360)
    w.note(text, height)


def source(w: Workflow, mini: bool = True) -> Source:
    w.group("1a  Clip", "blue")
    clip = w.add("TAVLoadVideo", **CLIP[mini])
    checkpoint = load_checkpoint(w, mini)
    w.group("2a  Inflate and encode", "blue")
    inflated = w.add("TAVInflate", model=checkpoint.MODEL)
    latent = w.add("VAEEncode", pixels=clip.images, vae=checkpoint.VAE)
    return Source(clip, inflated, checkpoint.CLIP, checkpoint.VAE, latent)


def load_checkpoint(w: Workflow, mini: bool = True) -> Node:
    w.group("1b  Checkpoint", "blue", below=True)
    if mini:
        return w.add("TAVLoadCheckpoint")
    return w.add("CheckpointLoaderSimple", ckpt_name="v1-5-pruned-emaonly.safetensors")


def sentence(w: Workflow, text: Node | tuple, title: str, words: str | Node | tuple) -> Node:
    return w.add("CLIPTextEncode", title=title, colour="green" if words else "red", clip=text, text=words)


def sentences(w: Workflow, text: Node | tuple, described: str = PROMPT, edited: str = EDIT) -> tuple[Node, Node, Node]:
    """What the clip shows, what it should show, and nothing."""
    w.group("2b  Sentences", "green", below=True)
    shown, wanted = (
        sentence(w, text, "What the clip shows", described),
        sentence(w, text, "What it should show", edited),
    )
    return shown, wanted, nothing(w, text)


def nothing(w: Workflow, text: Node | tuple) -> Node:
    return sentence(w, text, "Nothing (leave it empty)", "")


def tuning(w: Workflow, start: Source, described: Node, edit: Node, mini: bool = True, **more) -> Node:
    w.group("3  Tune", "purple", 380)
    given = dict(model=start.model, latent=start.latent, positive=described, preview_prompt=edit, vae=start.vae)
    tuned = w.add("TAVOneShotTune", **given, **TUNING[mini], **more)
    w.add("PreviewImage", title="Loss curve", images=tuned.loss_curve)
    return tuned


def inverted(
    w: Workflow, model, start: Source, conditioning, mini: bool = True, title: str = "4  Invert", **more
) -> Node:
    w.group(title, "cyan")
    given = dict(model=model, latent=start.latent, conditioning=conditioning, steps=SAMPLING[mini]["steps"])
    return w.add("TAVDDIMInversion", **given | more)


def put_back(w: Workflow, frames: Node, start: Source, subject: Node, region: str) -> Node:
    return w.add("TAVPutBack", images=frames, clip=start.clip.images, subject=subject, region=region)


def found_subject(w: Workflow, tuned: Node, start: Source, described: Node) -> tuple[Node, Node]:
    """The inverted noise, and where the subject is, by two sentences about others."""
    w.group("2c  Other subjects", "green", 380, below=True)
    others = [sentence(w, start.text, "The same with another subject", text) for text in CONTRASTS[:2]]
    noise = inverted(w, tuned.MODEL, start, described, measure=False, title="4  Invert, and find the subject")
    contrast = w.add("ConditioningCombine", conditioning_1=others[0], conditioning_2=others[1])
    found = dict(latent=start.latent, images=start.clip.images, conditioning=described, contrast=contrast)
    return noise, w.add("TAVSubjectMask", model=tuned.MODEL, **found)


def injected(w: Workflow, model, described, **more) -> Node:
    """The tuned MODEL, for sampling: its edits attend as the clip does."""
    return w.add("TAVAttentionInjection", model=model, conditioning=described, **more)


def sampled(w: Workflow, model, positive, negative, noise: Node, vae, mini: bool = True, **more) -> Node:
    """The frames of an edit from inverted noise."""
    given = dict(model=model, positive=positive, negative=negative, noise=noise.noise, sigmas=noise.sigmas)
    return decoded(w, w.add("TAVVideoSampler", **given | SAMPLING[mini] | more), vae)


def decoded(w: Workflow, samples, vae) -> Node:
    return w.add("VAEDecode", samples=samples, vae=vae)


def result(
    w: Workflow, name: str, clip: Node, clips: list, labels: list[str], edits: dict[str, Node | tuple], number: int = 6
):
    """Compares IMAGE batches and saves the video, then each of the edits, by its name, as a video of its own.

    Args:
        number: of the first of these two steps.
    """
    w.group(f"{number}  Compare and save", "pale_blue", 400)
    images = {f"images_{i}": images for i, images in enumerate(clips, 1)}
    compare = w.add("TAVCompare", labels="\n".join(labels), **images)
    saved(w, compare.video, clip, name)
    w.group("Frames", "pale_blue", below=True)
    w.add("PreviewImage", title="Frames", images=compare.strip)
    for i, (edit, frames) in enumerate(edits.items()):
        w.group(f"{number + 1}  Saved alone: {edit}", "pale_blue", below=i % 2 == 1)
        saved(w, frames, clip, f"{name}-{edit.replace(' ', '-')}")


def saved(w: Workflow, frames: Node | tuple, clip: Node, name: str | Node):
    """A video file with the clip's rate and sound. A name that a node gives is the whole prefix of the file."""
    video = w.add("CreateVideo", images=frames, fps=clip.fps, audio=clip.audio)
    w.add("SaveVideo", video=video, filename_prefix=f"video/{name}" if isinstance(name, str) else name)
