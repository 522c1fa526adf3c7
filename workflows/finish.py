"""41 and 42: a larger video, the clip's own size, and more frames a second."""

from tav_core.mini.demo import EDITS, PROMPT
from workflows.graph import Workflow
from workflows.parts import (
    CLIP,
    decoded,
    found_subject,
    injected,
    inverted,
    nothing,
    read_me,
    result,
    sampled,
    sentence,
    sentences,
    source,
    tuning,
)


def upscale(w: Workflow, name: str):
    read_me(
        w,
        """# Upscale

Two stock ways to a larger video, after the sampler:

- **Image**: *Upscale Image By* enlarges the decoded frames. Quick, nothing new is drawn.
- **Latent**: *Upscale Latent By*, then a second *KSampler* with the tuned model at a low *denoise* draws the details at the new size, for all frames together.

Instead of *Upscale Image By* you can use *Upscale Image (using Model)*. With the mini checkpoint, which has only ever seen 128 x 128 pixels, the second way mainly shows the wiring; with Stable Diffusion it is the better one.
""",
        450,
    )
    start = source(w)
    described, edit, empty = sentences(w, start.text)
    tuned = tuning(w, start, described, edit)
    noise = inverted(w, tuned.MODEL, start, described)
    w.group("4b  Edit", "cyan")
    said = dict(positive=edit, negative=empty)
    found = dict(noise=noise.noise, sigmas=noise.sigmas, steps=25, cfg=5.0)
    sample = w.add("TAVVideoSampler", model=injected(w, tuned.MODEL, described), **said, **found)
    w.group("5a  Upscale the images", "red")
    by_image = w.add("ImageScaleBy", image=decoded(w, sample, start.vae), upscale_method="lanczos", scale_by=2.0)
    w.group("5b  Upscale the latent", "red", below=True)
    large = w.add("LatentUpscaleBy", samples=sample, upscale_method="bislerp", scale_by=2.0)
    settings = dict(steps=8, cfg=5.0, sampler_name="euler", scheduler="normal", denoise=0.4)
    refined = w.add("KSampler", model=tuned.MODEL, **said, latent_image=large, **settings)
    by_latent = decoded(w, refined, start.vae)
    labels = ["image upscale", "latent upscale"]
    result(w, name, start.clip, [by_image, by_latent], labels, dict(zip(labels, (by_image, by_latent))))


def back_to_source(w: Workflow, name: str):
    read_me(
        w,
        """# Back to the clip's own size

The edit is drawn at the size of the checkpoint. Here it ends in the clip as it was: the same frames are loaded a second time at the **clip's own size**, and the edited subject is laid over them.

*Subject Mask* says where it is, *Grow Mask* leaves it a margin, and the stock *ImageCompositeMasked* enlarges edit and mask to the clip (*resize_source*). All around the subject, every pixel is the clip's.

For your clip: *start*, *stride* and *count* are the same in both *Load Video*, *width* and *height* of the second are those of your video (or of its crop: both must show the same part). Put *Upscale Image (using Model)* behind *VAE Decode* for a sharper subject.

**More frames a second**: stride 2 or 3 leaves few frames a second. An interpolation pack draws those between: with *ComfyUI-Frame-Interpolation* put its *RIFE VFI*, *multiplier* 2, between *ImageCompositeMasked* and *Create Video*, and give *Create Video* twice the *fps* (write the number). The sound stays as it is.
""",
        640,
    )
    start = source(w)
    w.group("2b  Sentences", "green", below=True)
    described = sentence(w, start.text, "What the clip shows", PROMPT)
    edit = sentence(w, start.text, "Another colour", EDITS["colour"])
    empty = nothing(w, start.text)
    tuned = tuning(w, start, described, edit)
    noise, subject = found_subject(w, tuned, start, described)
    w.group("5a  Edit the subject", "cyan")
    model = injected(w, tuned.MODEL, described, region="subject", subject=subject)
    small = sampled(w, model, edit, empty, noise, start.vae)
    w.group("5b  The clip at its own size", "blue")
    large = w.add("TAVLoadVideo", title="The clip at its own size", **CLIP[True] | dict(width=256, height=256))
    w.group("5c  Lay the edit over it", "red", below=True)
    grown = w.add("GrowMask", mask=subject, expand=2)
    over = dict(destination=large.images, source=small, mask=grown, resize_source=True)
    frames = w.add("ImageCompositeMasked", **over)
    labels = ["source", EDITS["colour"]]
    result(w, name, start.clip, [large.images, frames], labels, {"edit": frames})
