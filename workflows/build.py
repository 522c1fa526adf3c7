"""Builds the workflows of this folder from the descriptions below, in the format that ComfyUI's frontend saves.

    python workflows/build.py http://127.0.0.1:8188                 # writes the JSON files
    python workflows/build.py http://127.0.0.1:8188 --thumbnails    # also runs the mini ones and renders the pictures

The running ComfyUI tells the inputs, widgets and outputs of each node, so their order is right.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tav_core.mini.demo import CONTRASTS, EDITS, PROMPT  # noqa: E402
from workflows.graph import Node, Workflow  # noqa: E402
from workflows.thumbnails import PICTURES, fetch, frames_of_run, thumbnail  # noqa: E402

DEMO = "demo clip of the mini checkpoint"
HINTS = "silhouettes for the mini ControlNet"
LORA = "mini-neon.safetensors"
EDIT = EDITS["background"]
SAVED = "demo-clip"  # the name under which 02 saves and 04 loads


# --------------------------------------------------------------------------------------------- the workflows


def source(w: Workflow, mini: bool = True) -> tuple:
    """The clip, the inflated model, CLIP, VAE and the clip's latents."""
    w.group("1a  Clip", "blue", below=True)
    wanted = dict(file=DEMO, count=8, width=128, height=128) if mini else dict(file="skiing.mp4", stride=2, count=16)
    clip = w.add("TAVLoadVideo", **wanted)
    w.group("1b  Checkpoint", "blue")
    checkpoint = (
        w.add("TAVLoadCheckpoint")
        if mini
        else w.add("CheckpointLoaderSimple", ckpt_name="v1-5-pruned-emaonly.safetensors")
    )
    inflated = w.add("TAVInflate", model=checkpoint.MODEL)
    latent = w.add("VAEEncode", pixels=clip.images, vae=checkpoint.VAE)
    return clip, inflated, checkpoint.CLIP, checkpoint.VAE, latent


def sentence(w: Workflow, clip_model, title: str, text: str) -> Node:
    return w.add("CLIPTextEncode", title=title, colour="green" if text else "red", clip=clip_model, text=text)


def tuning(w: Workflow, inflated, latent, described, edit, vae, mini: bool = True, **more) -> Node:
    w.group("3  Tune", "purple", 380)
    settings = (
        dict(steps=200, learning_rate=0.002, timestep_sampling="stratified", preview_every=50)
        if mini
        else dict(steps=500, learning_rate=3e-5, preview_every=100)
    )
    tuned = w.add(
        "TAVOneShotTune",
        model=inflated,
        latent=latent,
        positive=described,
        preview_prompt=edit,
        vae=vae,
        **settings,
        **more,
    )
    w.add("PreviewImage", title="Loss curve", images=tuned.loss_curve)
    return tuned


def sentences(w: Workflow, clip_model):
    """What the clip shows, what it should show, and nothing."""
    described = sentence(w, clip_model, "What the clip shows", PROMPT)
    edit = sentence(w, clip_model, "What it should show", EDIT)
    return described, edit, sentence(w, clip_model, "Nothing (leave it empty)", "")


def sampled(w: Workflow, model, positive, negative, noise):
    settings = {"noise": noise.noise, "sigmas": noise.sigmas, "steps": 25, "cfg": 5.0}
    return w.add("TAVVideoSampler", model=model, positive=positive, negative=negative, **settings)


def injected(w: Workflow, model, described) -> Node:
    """The tuned MODEL, for sampling: its edits attend as the clip does."""
    return w.add("TAVAttentionInjection", model=model, conditioning=described)


def result(w: Workflow, name: str, clip: Node, clips: list, labels: list[str], edits: dict[str, Node | tuple]):
    """Compares IMAGE batches and saves the video, then each of the edits, by its name, as a video of its own."""
    w.group("6  Compare and save", "pale_blue", 400)
    images = {f"images_{i}": images for i, images in enumerate(clips, 1)}
    compare = w.add("TAVCompare", labels="\n".join(labels), **images)
    saved(w, compare.video, clip, name)
    w.group("Frames", "pale_blue", below=True)
    w.add("PreviewImage", title="Frames", images=compare.strip)
    for i, (edit, frames) in enumerate(edits.items()):
        w.group(f"7  Saved alone: {edit}", "pale_blue", below=i % 2 == 1)
        saved(w, frames, clip, f"{name}-{edit.replace(' ', '-')}")


def saved(w: Workflow, frames: Node | tuple, clip: Node, name: str):
    """A video file with the clip's rate and sound."""
    video = w.add("CreateVideo", images=frames, fps=clip.fps, audio=clip.audio)
    w.add("SaveVideo", video=video, filename_prefix=f"video/{name}")


def one_shot(w: Workflow, name: str, mini: bool = True, note: str = ""):
    described, edited = (
        (PROMPT, EDIT) if mini else ("a man is skiing", "spider man is skiing on the beach, cartoon style")
    )
    w.group("Read me", "yellow", 360)
    w.note(note, 540)
    clip, inflated, clip_model, vae, latent = source(w, mini)
    w.group("2  Sentences", "green", below=True)
    described = sentence(w, clip_model, "What the clip shows", described)
    edit = sentence(w, clip_model, "What it should show", edited)
    empty = sentence(w, clip_model, "Nothing (leave it empty)", "")
    tuned = tuning(w, inflated, latent, described, edit, vae, mini)
    w.group("4  Invert", "cyan")
    steps = 25 if mini else 50
    noise = w.add(
        "TAVDDIMInversion", model=tuned.MODEL, latent=latent, conditioning=described if mini else empty, steps=steps
    )
    w.group("5  Edit", "cyan")
    model = injected(w, tuned.MODEL, described) if mini else tuned.MODEL  # 03 is the paper, to the letter
    sample = w.add(
        "TAVVideoSampler",
        model=model,
        positive=edit,
        negative=empty,
        noise=noise.noise,
        sigmas=noise.sigmas,
        steps=steps,
        cfg=5.0 if mini else 12.5,
    )
    frames = w.add("VAEDecode", samples=sample, vae=vae)
    result(w, name, clip, [clip.images, frames], ["source", edited], {"edit": frames})


def mini_edit(w: Workflow, name: str):
    one_shot(
        w,
        name,
        note=f"""# One-shot edit

Press **Run**. Everything needed ships with the pack, and a CPU is enough.

1. A clip of 8 frames and a small checkpoint are loaded. *Inflate* makes an image model see all frames at once.
2. One sentence says what the clip shows, another what it should show.
3. *One-Shot Tune* learns this one clip. The loss and previews of the edit appear in the node, and in the end the loss curve. Cancel when you like and run again: it goes on where it stopped.
4. *DDIM Inversion* finds the noise that holds the motion of the clip.
5. *Video Sampler* draws the edit from that noise. *Attention Injection* keeps it close to the clip: lower *share* for a freer edit.
6. Source and edit, side by side, are saved as a video.
7. So is the edit alone, with the rate and the sound of the clip.

**Try**: change the words of the second sentence and run again. Only the edit is computed anew. The mini checkpoint knows shapes (ball, star, ...), colours, places (grass, snow, sand, ...) and styles (sketch, ...):

- {EDITS["style"]}
- {EDITS["colour"]}
- {EDITS["subject"]}
""",
    )


def sd15_edit(w: Workflow, name: str):
    one_shot(
        w,
        name,
        mini=False,
        note="""# One-shot edit with Stable Diffusion 1.5

The graph of 01 with the stock *Load Checkpoint* and the settings of the paper. Before you run it:

1. **Load Video**: upload your clip with the button, and choose *start*, *stride* and *count* so that 8 to 24 frames show the motion.
2. **Load Checkpoint**: choose a Stable Diffusion 1.x checkpoint (2.1 works as well, at 768 x 768).
3. **What the clip shows**: one plain sentence about your clip.
4. **What it should show**: the same sentence with other words.

500 steps at a learning rate of 0.00003, 50 steps of inversion and sampling, cfg 12.5. A GPU is needed; with 12 GB keep *count* at 8.

LoRAs go between *Load Checkpoint* and *Inflate*. If an edit loses the motion, put *Attention Injection* before *Video Sampler* (workflow 01 shows how), or lower *cfg*.
""",
    )


def four_edits(w: Workflow, name: str):
    w.group("Read me", "yellow", 360)
    w.note(
        f"""# Four edits from one tuning

The clip is tuned and inverted once. From the same noise four samplers draw four kinds of edit: another **subject**, another **colour**, another **place**, another **style**.

*Save Tuned Weights* keeps what was learned as `models/tune_a_video/{SAVED}.safetensors`: workflow 04 uses it without tuning.

If you ran 01 before, the tuning isn't repeated.
""",
        270,
    )
    clip, inflated, clip_model, vae, latent = source(w)
    w.group("2  Sentences", "green")
    described = sentence(w, clip_model, "What the clip shows", PROMPT)
    empty = sentence(w, clip_model, "Nothing (leave it empty)", "")
    edits = {kind: sentence(w, clip_model, f"Another {kind}", text) for kind, text in EDITS.items()}
    tuned = tuning(w, inflated, latent, described, edits["background"], vae)
    w.group("Keep", "yellow", 380, below=True)
    w.add("TAVSaveTunedWeights", tuned_weights=tuned.tuned_weights, name=SAVED, prompt=PROMPT)
    w.group("4  Invert", "cyan")
    noise = w.add("TAVDDIMInversion", model=tuned.MODEL, latent=latent, conditioning=described, steps=25)
    model = injected(w, tuned.MODEL, described)
    frames = []
    for kind, edit in edits.items():
        if kind in ("subject", "background"):
            w.group("5a  Edit the subject" if kind == "subject" else "5b  Edit the rest", "cyan")
        sample = w.add(
            "TAVVideoSampler",
            title=f"Video Sampler: {kind}",
            model=model,
            positive=edit,
            negative=empty,
            noise=noise.noise,
            sigmas=noise.sigmas,
            steps=25,
            cfg=5.0,
        )
        frames.append(w.add("VAEDecode", samples=sample, vae=vae))
    result(w, name, clip, [clip.images, *frames], ["source", *EDITS], dict(zip(EDITS, frames)))


def reuse(w: Workflow, name: str):
    w.group("Read me", "yellow", 360)
    w.note(
        f"""# Tuned weights again

No tuning here: the weights come from `models/tune_a_video/{SAVED}.safetensors`. **Run 02 first**: its *Save Tuned Weights* writes this file. If the list of *Load Tuned Weights* is empty, press **R** to refresh it.

Checkpoint, LoRAs and the settings of *Inflate* must be those of the tuning, and the clip must have as many frames.
""",
        380,
    )
    clip, inflated, clip_model, vae, latent = source(w)
    w.group("2  Sentences", "green", below=True)
    described = sentence(w, clip_model, "What the clip shows", PROMPT)
    edit = sentence(w, clip_model, "What it should show", EDITS["style"])
    empty = sentence(w, clip_model, "Nothing (leave it empty)", "")
    w.group("3  Load what was tuned", "purple")
    loaded = w.add("TAVLoadTunedWeights", file=f"{SAVED}.safetensors")
    tuned = w.add("TAVApplyTunedWeights", model=inflated, tuned_weights=loaded.tuned_weights)
    w.group("4  Invert", "cyan")
    noise = w.add("TAVDDIMInversion", model=tuned, latent=latent, conditioning=described, steps=25)
    w.group("5  Edit", "cyan")
    model = injected(w, tuned, described)
    sample = sampled(w, model, edit, empty, noise)
    frames = w.add("VAEDecode", samples=sample, vae=vae)
    result(w, name, clip, [clip.images, frames], ["source", EDITS["style"]], {"edit": frames})


def stock_sampler(w: Workflow, name: str):
    sampler, scheduler = "dpmpp_2m", "normal"
    w.group("Read me", "yellow", 360)
    w.note(
        f"""# Stock sampler

The tuned model is a MODEL like any other, so every sampler works on it. Here the stock *KSampler (Advanced)* draws the edit with **{sampler}** and **{scheduler}**.

What matters:

- *add_noise* is **disabled**: the noise comes from *DDIM Inversion*.
- *steps* and *scheduler* are the same in both nodes, so the sampler starts where the inversion ended.
- *start_at_step* is 0, *return_with_leftover_noise* is disabled.
""",
        410,
    )
    clip, inflated, clip_model, vae, latent = source(w)
    w.group("2  Sentences", "green", below=True)
    described, edit, empty = sentences(w, clip_model)
    tuned = tuning(w, inflated, latent, described, edit, vae)
    w.group("4  Invert", "cyan")
    noise = w.add(
        "TAVDDIMInversion", model=tuned.MODEL, latent=latent, conditioning=described, steps=25, scheduler=scheduler
    )
    w.group("5  Edit with a stock sampler", "cyan")
    model = injected(w, tuned.MODEL, described)
    sample = w.add(
        "KSamplerAdvanced",
        model=model,
        positive=edit,
        negative=empty,
        latent_image=noise.noise,
        add_noise="disable",
        steps=25,
        cfg=5.0,
        sampler_name=sampler,
        scheduler=scheduler,
    )
    frames = w.add("VAEDecode", samples=sample, vae=vae)
    result(w, name, clip, [clip.images, frames], ["source", f"{EDIT} ({sampler}, {scheduler})"], {"edit": frames})


def upscale(w: Workflow, name: str):
    w.group("Read me", "yellow", 360)
    w.note(
        """# Upscale

Two stock ways to a larger video, after the sampler:

- **Image**: *Upscale Image By* enlarges the decoded frames. Quick, nothing new is drawn.
- **Latent**: *Upscale Latent By*, then a second *KSampler* with the tuned model at a low *denoise* draws the details at the new size, for all frames together.

Instead of *Upscale Image By* you can use *Upscale Image (using Model)*. With the mini checkpoint, which has only ever seen 128 x 128 pixels, the second way mainly shows the wiring; with Stable Diffusion it is the better one.
""",
        450,
    )
    clip, inflated, clip_model, vae, latent = source(w)
    w.group("2  Sentences", "green", below=True)
    described, edit, empty = sentences(w, clip_model)
    tuned = tuning(w, inflated, latent, described, edit, vae)
    w.group("4  Invert and edit", "cyan")
    noise = w.add("TAVDDIMInversion", model=tuned.MODEL, latent=latent, conditioning=described, steps=25)
    model = injected(w, tuned.MODEL, described)
    sample = sampled(w, model, edit, empty, noise)
    w.group("5a  Upscale the images", "red")
    small = w.add("VAEDecode", samples=sample, vae=vae)
    by_image = w.add("ImageScaleBy", image=small, upscale_method="lanczos", scale_by=2.0)
    w.group("5b  Upscale the latent", "red", below=True)
    large = w.add("LatentUpscaleBy", samples=sample, upscale_method="bislerp", scale_by=2.0)
    refined = w.add(
        "KSampler",
        model=tuned.MODEL,
        positive=edit,
        negative=empty,
        latent_image=large,
        steps=8,
        cfg=5.0,
        sampler_name="euler",
        scheduler="normal",
        denoise=0.4,
    )
    by_latent = w.add("VAEDecode", samples=refined, vae=vae)
    labels = ["image upscale", "latent upscale"]
    result(w, name, clip, [by_image, by_latent], labels, dict(zip(labels, (by_image, by_latent))))


def long_clip(w: Workflow, name: str):
    w.group("Read me", "yellow", 360)
    w.note(
        """# Long clips

The graph of 01 with one node more: *Context Windows*, between *Inflate* and *One-Shot Tune*.

The clip is looked at in overlapping windows, here of 6 frames, in the memory of 6. Each step of the tuning learns another window; inversion and sampling blend what they draw where windows overlap, so that no seam shows.

With a clip of your own: set *count* of *Load Video* to 60, 120 or what you like, *context_length* to 8 or 16 and *context_overlap* to half of it or less. More *steps* suit a longer clip.
""",
        380,
    )
    clip, inflated, clip_model, vae, latent = source(w)
    windowed = w.add("TAVContextWindows", model=inflated, context_length=6, context_overlap=3)
    w.group("2  Sentences", "green", below=True)
    described, edit, empty = sentences(w, clip_model)
    tuned = tuning(w, windowed, latent, described, edit, vae)
    w.group("4  Invert", "cyan")
    noise = w.add("TAVDDIMInversion", model=tuned.MODEL, latent=latent, conditioning=described, steps=25, measure=False)
    w.group("5  Edit", "cyan")
    model = injected(w, tuned.MODEL, described)
    sample = sampled(w, model, edit, empty, noise)
    frames = w.add("VAEDecode", samples=sample, vae=vae)
    result(w, name, clip, [clip.images, frames], ["source", EDIT], {"edit": frames})


def two_takes(w: Workflow, name: str):
    w.group("Read me", "yellow", 360)
    w.note(
        """# Two takes

One tuning learns from two clips: *Take* holds the second with its own sentence, and more of these nodes make a chain. Here the second take is the mirrored first one, so that what is learned is the subject, not its way from left to right; with clips of your own it is the motion that they share.

Each take can be edited afterwards. Here it is the second: it is inverted and sampled.
""",
        300,
    )
    clip, inflated, clip_model, vae, latent = source(w)
    w.group("Second take", "blue", below=True)
    mirrored = w.add("ImageFlip", image=clip.images, flip_method="y-axis: horizontally")
    second = w.add("VAEEncode", pixels=mirrored, vae=vae)
    w.group("2  Sentences", "green")
    described = sentence(w, clip_model, "What the first clip shows", PROMPT)
    also = sentence(w, clip_model, "What the second clip shows", PROMPT)
    edit = sentence(w, clip_model, "What the second should show", EDIT)
    empty = sentence(w, clip_model, "Nothing (leave it empty)", "")
    takes = w.add("TAVTake", latent=second, positive=also)
    tuned = tuning(w, inflated, latent, described, edit, vae, takes=takes)
    w.group("4  Invert the second", "cyan")
    noise = w.add("TAVDDIMInversion", model=tuned.MODEL, latent=second, conditioning=also, steps=25, measure=False)
    w.group("5  Edit it", "cyan")
    model = injected(w, tuned.MODEL, also)
    sample = sampled(w, model, edit, empty, noise)
    frames = w.add("VAEDecode", samples=sample, vae=vae)
    result(w, name, clip, [mirrored, frames], ["second take", EDIT], {"edit": frames})


def regions(w: Workflow, name: str):
    w.group("Read me", "yellow", 360)
    w.note(
        """# Only the subject, or all but the subject

*Subject Mask* finds the subject of the clip: where the model would draw something else for a sentence about another one. Two such sentences are put together here; more find more.

*Attention Injection* takes the mask. With *region* subject an edit changes the subject alone, with *region* background all else. *Put Back the Clip* then gives the rest its own pixels again, which a VAE never returns exactly.

Instead of *Subject Mask*, connect a mask that you drew or that another pack found; or, with a large checkpoint, *Word Mask*, which stands here unconnected: the word of the subject is enough for it.
""",
        380,
    )
    clip, inflated, clip_model, vae, latent = source(w)
    w.group("2  Sentences", "green")
    described = sentence(w, clip_model, "What the clip shows", PROMPT)
    others = [sentence(w, clip_model, "The same with another subject", text) for text in CONTRASTS[:2]]
    colour = sentence(w, clip_model, "Another colour", EDITS["colour"])
    place = sentence(w, clip_model, "Another place", EDITS["background"])
    empty = sentence(w, clip_model, "Nothing (leave it empty)", "")
    tuned = tuning(w, inflated, latent, described, colour, vae)
    w.group("4  Invert, and find the subject", "cyan")
    noise = w.add("TAVDDIMInversion", model=tuned.MODEL, latent=latent, conditioning=described, steps=25, measure=False)
    contrast = w.add("ConditioningCombine", conditioning_1=others[0], conditioning_2=others[1])
    subject = w.add(
        "TAVSubjectMask",
        model=tuned.MODEL,
        latent=latent,
        images=clip.images,
        conditioning=described,
        contrast=contrast,
    )
    mask = w.add("MaskToImage", mask=subject)
    w.group("Or by its word (large checkpoints)", "cyan", below=True)
    w.add(
        "TAVWordMask",
        model=tuned.MODEL,
        clip=clip_model,
        latent=latent,
        images=clip.images,
        sentence=PROMPT,
        word="ball",
    )
    frames = []
    for region, edit in (("subject", colour), ("background", place)):
        w.group(f"5  Edit the {region}", "cyan")
        model = w.add(
            "TAVAttentionInjection", model=tuned.MODEL, conditioning=described, region=region, subject=subject
        )
        sample = w.add(
            "TAVVideoSampler",
            model=model,
            positive=edit,
            negative=empty,
            noise=noise.noise,
            sigmas=noise.sigmas,
            steps=25,
            cfg=5.0,
        )
        decoded = w.add("VAEDecode", samples=sample, vae=vae)
        frames.append(w.add("TAVPutBack", images=decoded, clip=clip.images, subject=subject, region=region))
        if region == "subject":
            figures = dict(prompt=EDITS["colour"], source_prompt=PROMPT, clip_model="mini", mask=subject)
            measured = w.add("TAVMeasure", images=frames[0], source=clip.images, **figures)
            w.add("PreviewAny", title="Figures", source=measured.table)
    labels = ["source", "subject", EDITS["colour"], EDITS["background"]]
    edits = {"other colour": frames[0], "other place": frames[1]}
    result(w, name, clip, [clip.images, mask, *frames], labels, edits)


def controlnet(w: Workflow, name: str):
    edited = "a red star is bouncing on the grass"
    w.group("Read me", "yellow", 360)
    w.note(
        """# Another shape, another motion: ControlNet

The subject and its place come from the clip and the tuning, shape and motion from a second clip: silhouettes of a star that bounces, white on black. *Load ControlNet* and the stock *Apply ControlNet* give each frame its own.

The edit starts from random noise (*add_noise*), because the inverted noise of the clip holds its old motion. The last tile is the same without the ControlNet.

With Stable Diffusion 1.5: a ControlNet as a diffusers folder in `models/controlnet`, or a single file with the stock *Load ControlNet Model*; the hints then come from a preprocessor (depth, lines, poses) that sees a second clip.
""",
        390,
    )
    clip, inflated, clip_model, vae, latent = source(w)
    w.group("2  Sentences", "green", below=True)
    described = sentence(w, clip_model, "What the clip shows", PROMPT)
    edit = sentence(w, clip_model, "What it should show", edited)
    empty = sentence(w, clip_model, "Nothing (leave it empty)", "")
    tuned = tuning(w, inflated, latent, described, edit, vae)
    w.group("4  One hint a frame", "blue")
    hints = w.add("TAVLoadVideo", title="Silhouettes", file=HINTS, count=8, width=128, height=128)
    net = w.add("TAVLoadControlNet")
    applied = w.add("ControlNetApplyAdvanced", positive=edit, negative=empty, control_net=net, image=hints.images)
    frames = []
    for title, positive, negative in (
        ("5a  Edit", applied.positive, applied.negative),
        ("5b  Without the hints", edit, empty),
    ):
        w.group(title, "cyan", below=title[1] == "b")
        sample = w.add(
            "TAVVideoSampler",
            model=tuned.MODEL,
            positive=positive,
            negative=negative,
            noise=latent,
            steps=25,
            cfg=5.0,
            add_noise=True,
        )
        frames.append(w.add("VAEDecode", samples=sample, vae=vae))
    labels = ["source", "hints", edited, "without the hints"]
    result(w, name, clip, [clip.images, hints.images, *frames], labels, {"edit": frames[0]})


def lora_style(w: Workflow, name: str):
    w.group("Read me", "yellow", 360)
    w.note(
        f"""# A style from a LoRA

The mini checkpoint has never seen neon light; the LoRA `{LORA}`, which ships with the pack, has. The stock *Load LoRA (Model)* puts it on the tuned MODEL, once at half its strength and once at all of it. It needs no words: the sentence is that of the clip. One tuning and one inversion, both without the LoRA, serve both.

A LoRA may also come before *Inflate*: then it is baked in, and tuned weights belong to it. That suits a subject, and a style that the clip already has; another style would be unlearned again by the tuning, which sees the clip without it.

With Stable Diffusion 1.5: any LoRA in `models/loras`, and its own words in the sentence, if it has some.
""",
        390,
    )
    clip, inflated, clip_model, vae, latent = source(w)
    w.group("2  Sentences", "green", below=True)
    described = sentence(w, clip_model, "What the clip shows", PROMPT)
    empty = sentence(w, clip_model, "Nothing (leave it empty)", "")
    tuned = tuning(w, inflated, latent, described, described, vae)
    w.group("4  Invert", "cyan")
    noise = w.add("TAVDDIMInversion", model=tuned.MODEL, latent=latent, conditioning=described, steps=25)
    frames = []
    for part, strength in (("a", 0.5), ("b", 1.0)):
        w.group(f"5{part}  With the LoRA at {strength}", "red")
        styled = w.add("LoraLoaderModelOnly", model=tuned.MODEL, lora_name=LORA, strength_model=strength)
        sample = w.add(
            "TAVVideoSampler",
            model=injected(w, styled, described),
            positive=described,
            negative=empty,
            noise=noise.noise,
            sigmas=noise.sigmas,
            steps=25,
            cfg=5.0,
        )
        frames.append(w.add("VAEDecode", samples=sample, vae=vae))
    labels = ["neon 0.5", "neon 1.0"]
    result(w, name, clip, [clip.images, *frames], ["source", *labels], dict(zip(labels, frames)))


def metrics(w: Workflow, name: str):
    w.group("Read me", "yellow", 360)
    w.note(
        """# How good is the edit?

*Measure* compares the edit with its clip and shows a line a figure, in brackets the clip's own:

- outside of the *mask* the edit should be the clip (**psnr_rest**, **ssim_rest**): *Put Back the Clip* sees to that
- it should move as the clip does (**motion_fidelity**, **warp_error**) and not **flicker**
- a CLIP says how well it shows its sentence (**tgve_text**: higher than the clip's own), and how alike its frames are

Alike frames alone prove nothing: a video that stands still has them. The plot shows some of the figures along the frames, so which of them failed.

The small CLIP that ships with the pack knows the mini world alone, and its scores compare with nothing else. For your clips put a CLIP such as openai/clip-vit-large-patch14 as a folder into `models/clip_vision`, and choose it in *clip_model*.
""",
        520,
    )
    clip, inflated, clip_model, vae, latent = source(w)
    w.group("2  Sentences", "green")
    described = sentence(w, clip_model, "What the clip shows", PROMPT)
    others = [sentence(w, clip_model, "The same with another subject", text) for text in CONTRASTS[:2]]
    edit = sentence(w, clip_model, "What it should show", EDITS["colour"])
    empty = sentence(w, clip_model, "Nothing (leave it empty)", "")
    tuned = tuning(w, inflated, latent, described, edit, vae)
    w.group("4  Invert, and find the subject", "cyan")
    noise = w.add("TAVDDIMInversion", model=tuned.MODEL, latent=latent, conditioning=described, steps=25, measure=False)
    contrast = w.add("ConditioningCombine", conditioning_1=others[0], conditioning_2=others[1])
    found = dict(latent=latent, images=clip.images, conditioning=described, contrast=contrast)
    subject = w.add("TAVSubjectMask", model=tuned.MODEL, **found)
    w.group("5  Edit the subject", "cyan")
    held = dict(conditioning=described, region="subject", subject=subject)
    model = w.add("TAVAttentionInjection", model=tuned.MODEL, **held)
    sample = sampled(w, model, edit, empty, noise)
    decoded = w.add("VAEDecode", samples=sample, vae=vae)
    frames = w.add("TAVPutBack", images=decoded, clip=clip.images, subject=subject, region="subject")
    result(w, name, clip, [clip.images, frames], ["source", EDITS["colour"]], {"edit": frames})
    w.group("8  Measure", "red", 400)
    figures = dict(prompt=EDITS["colour"], source_prompt=PROMPT, clip_model="mini", mask=subject)
    measured = w.add("TAVMeasure", images=frames, source=clip.images, **figures)
    w.add("PreviewAny", title="Figures", source=measured.table)
    w.add("SaveImage", title="Along the frames", images=measured.plot, filename_prefix=f"{name}-plot")


WORKFLOWS = {
    "01-one-shot-edit-mini": mini_edit,
    "02-four-edits-mini": four_edits,
    "03-one-shot-edit-sd15": sd15_edit,
    "04-reuse-tuned-weights-mini": reuse,
    "05-stock-sampler-mini": stock_sampler,
    "06-upscale-mini": upscale,
    "07-long-clip-mini": long_clip,
    "08-two-takes-mini": two_takes,
    "09-regions-mini": regions,
    "10-controlnet-mini": controlnet,
    "11-lora-mini": lora_style,
    "12-metrics-mini": metrics,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", help="address of a running ComfyUI with this pack")
    parser.add_argument("--thumbnails", action="store_true", help="run the mini workflows and render their pictures")
    parser.add_argument("--output", type=Path, default=HERE, help="folder for the files (this one)")
    arguments = parser.parse_args()
    definitions = json.loads(fetch(f"{arguments.server}/object_info"))
    frames = {}
    for name, describe in WORKFLOWS.items():
        workflow = Workflow(definitions)
        describe(workflow, name)
        (arguments.output / f"{name}.json").write_text(json.dumps(workflow.json(name), indent=1) + "\n")
        print(name, len(workflow.nodes), "nodes")
        if arguments.thumbnails and name.endswith("mini"):
            frames[name] = frames_of_run(arguments.server, workflow)
    if arguments.thumbnails:
        frames["03-one-shot-edit-sd15"] = frames[
            "01-one-shot-edit-mini"
        ]  # the same graph, which needs a large checkpoint
        for name, (caption, rows) in PICTURES.items():
            thumbnail(frames[name], caption, rows).save(arguments.output / f"{name}.jpg", quality=85)


if __name__ == "__main__":
    main()
