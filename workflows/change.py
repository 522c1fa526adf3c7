"""11 to 15: what may change, and how: the subject alone, all but it, its shape, the style, and along the frames."""

from tav_core.mini.demo import EDITS, PROMPT
from workflows.graph import Workflow
from workflows.parts import (
    MINI_STEPS,
    OWN,
    SAMPLING,
    decoded,
    found_subject,
    injected,
    inverted,
    nothing,
    put_back,
    read_me,
    result,
    sampled,
    sentence,
    sentences,
    source,
    tuning,
)

HINTS = "silhouettes for the mini ControlNet"
LORA = "mini-neon.safetensors"


def regions(w: Workflow, name: str):
    read_me(
        w,
        """# Only the subject, or all but the subject

*Subject Mask* finds the subject of the clip: where the model would draw something else for a sentence about another one. Two such sentences are put together here; more find more.

*Attention Injection* takes the mask. With *region* subject an edit changes the subject alone, with *region* background all else. *Put Back the Clip* then gives the rest its own pixels again, which a VAE never returns exactly.

Instead of *Subject Mask*, connect a mask that you drew or that another pack found; or, with a large checkpoint, *Word Mask*, for which the word of the subject is enough: workflow 12.
""",
        420,
    )
    start = source(w)
    w.group("2b  Sentences", "green", below=True)
    described = sentence(w, start.text, "What the clip shows", PROMPT)
    colour = sentence(w, start.text, "Another colour", EDITS["colour"])
    place = sentence(w, start.text, "Another place", EDITS["background"])
    empty = nothing(w, start.text)
    tuned = tuning(w, start, described, colour)
    noise, subject = found_subject(w, tuned, start, described)
    mask = w.add("MaskToImage", mask=subject)
    frames = []
    for part, region, edit in (("a", "subject", colour), ("b", "background", place)):
        w.group(f"5{part}  Edit the {region}", "cyan")
        model = injected(w, tuned.MODEL, described, region=region, subject=subject)
        drawn = sampled(w, model, edit, empty, noise, start.vae)
        frames.append(put_back(w, drawn, start, subject, region))
    labels = ["source", "subject", EDITS["colour"], EDITS["background"]]
    edits = {"other colour": frames[0], "other place": frames[1]}
    result(w, name, start.clip, [start.clip.images, mask, *frames], labels, edits)


def regions_sd15(w: Workflow, name: str):
    said = "a man in a blue suit is skiing on the snow"
    wanted = {"subject": "a man in a red suit is skiing on the snow",
              "background": "a man in a blue suit is skiing on the beach"}  # fmt: skip
    read_me(
        w,
        f"""# Only the subject, or all but it, with Stable Diffusion 1.5

Upload your clip, choose your checkpoint, and write three sentences: what the clip shows, the same with something else about the subject, and the same with another place.

*Word Mask* finds the subject by its **word**, which has to stand in the sentence of the clip. Look at the mask, the second tile of the comparison: too much is white with a *threshold* that is too low. If it isn't found, tune longer, name it by another word, or use *Subject Mask* as in workflow 11.

*Attention Injection* takes the mask: *region* subject changes the subject alone, background all else; **shape**, for another thing in its place, leaves it room for another outline. *Put Back the Clip* gives the rest its own pixels again.

*Save Tuned Weights* keeps what was learned as `models/tune_a_video/{OWN}.safetensors`, for workflow 05.
""",
        520,
    )
    start = source(w, mini=False)
    w.group("2b  Sentences", "green", below=True)
    described = sentence(w, start.text, "What the clip shows", said)
    edits = {region: sentence(w, start.text, f"Another {region}", text) for region, text in wanted.items()}
    empty = nothing(w, start.text)
    tuned = tuning(w, start, described, edits["subject"], mini=False)
    w.group("Keep", "yellow", 380, below=True)
    w.add("TAVSaveTunedWeights", tuned_weights=tuned.tuned_weights, name=OWN, prompt=said)
    title = "4  Invert, and find the subject"
    noise = inverted(w, tuned.MODEL, start, described, mini=False, measure=False, title=title)
    found = dict(model=tuned.MODEL, clip=start.text, latent=start.latent, images=start.clip.images)
    subject = w.add("TAVWordMask", **found, sentence=said, word="man")
    mask = w.add("MaskToImage", mask=subject)
    frames = []
    for part, (region, edit) in zip("ab", edits.items()):
        w.group(f"5{part}  Edit the {region}", "cyan")
        model = injected(w, tuned.MODEL, described, region=region, subject=subject)
        drawn = sampled(w, model, edit, empty, noise, start.vae, mini=False, cfg=9.5)
        frames.append(put_back(w, drawn, start, subject, region))
    labels = ["source", "subject", *wanted.values()]
    shown = {"other subject": frames[0], "other place": frames[1]}
    result(w, name, start.clip, [start.clip.images, mask, *frames], labels, shown)


def controlnet(w: Workflow, name: str):
    edited = "a red star is bouncing on the grass"
    read_me(
        w,
        """# Another shape, another motion: ControlNet

The subject and its place come from the clip and the tuning, shape and motion from a second clip: silhouettes of a star that bounces, white on black. *Load ControlNet* and the stock *Apply ControlNet* give each frame its own.

The edit starts from random noise (*add_noise*), because the inverted noise of the clip holds its old motion. The last tile is the same without the ControlNet.

With Stable Diffusion 1.5: a ControlNet as a diffusers folder in `models/controlnet`, or a single file with the stock *Load ControlNet Model*; the hints then come from a preprocessor (depth, lines, poses) that sees a second clip.
""",
        390,
    )
    start = source(w)
    described, edit, empty = sentences(w, start.text, edited=edited)
    tuned = tuning(w, start, described, edit)
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
        said = dict(model=tuned.MODEL, positive=positive, negative=negative, noise=start.latent)
        samples = w.add("TAVVideoSampler", **said, **SAMPLING[True], add_noise=True)
        frames.append(decoded(w, samples, start.vae))
    labels = ["source", "hints", edited, "without the hints"]
    result(w, name, start.clip, [start.clip.images, hints.images, *frames], labels, {"edit": frames[0]})


def lora_style(w: Workflow, name: str):
    read_me(
        w,
        f"""# A style from a LoRA

The mini checkpoint has never seen neon light; the LoRA `{LORA}`, which ships with the pack, has. The stock *Load LoRA (Model)* puts it on the tuned MODEL, once at half its strength and once at all of it. It needs no words: the sentence is that of the clip. One tuning and one inversion, both without the LoRA, serve both.

A LoRA may also come before *Inflate*: then it is baked in, and tuned weights belong to it. That suits a subject, and a style that the clip already has; another style would be unlearned again by the tuning, which sees the clip without it.

With Stable Diffusion 1.5: any LoRA in `models/loras`, and its own words in the sentence, if it has some.
""",
        390,
    )
    start = source(w)
    w.group("2b  Sentences", "green", below=True)
    described, empty = sentence(w, start.text, "What the clip shows", PROMPT), nothing(w, start.text)
    tuned = tuning(w, start, described, described)
    noise = inverted(w, tuned.MODEL, start, described)
    frames = []
    for part, strength in (("a", 0.5), ("b", 1.0)):
        w.group(f"5{part}  With the LoRA at {strength}", "cyan")
        styled = w.add("LoraLoaderModelOnly", model=tuned.MODEL, lora_name=LORA, strength_model=strength)
        frames.append(sampled(w, injected(w, styled, described), described, empty, noise, start.vae))
    labels = ["neon 0.5", "neon 1.0"]
    result(w, name, start.clip, [start.clip.images, *frames], ["source", *labels], dict(zip(labels, frames)))


def travel(w: Workflow, name: str):
    first, last = PROMPT.replace("red", "blue"), PROMPT.replace("red", "green")
    read_me(
        w,
        """# A sentence that changes along the frames

One sentence holds for the first frames, another for the last, and in between one fades into the other.

Each sentence gets a **mask for each frame**: *Conditioning (Set Mask)* gives it as much weight in a frame as the mask is white there. The masks are plain pictures, a batch of two frames for each of four greys, put together to eight; the second sentence has them, the first has them inverted. Both sentences are then combined.

For your own clip: make as many greys as you like, and give each as many frames (*batch_size*) as it should last; in all as many as the clip has. A black and a white picture alone are a cut. Masks drawn within the frame work as well: then a sentence has its own part of the picture.
""",
        420,
    )
    start = source(w)
    w.group("2b  Sentences", "green", below=True)
    described = sentence(w, start.text, "What the clip shows", PROMPT)
    begins, ends = (sentence(w, start.text, title, text) for title, text in (("At first", first), ("At last", last)))
    empty = nothing(w, start.text)
    tuned = tuning(w, start, described, begins)
    noise = inverted(w, tuned.MODEL, start, described, measure=False)
    w.group("4a  How white in which frame", "blue")
    greys = [
        w.add(
            "EmptyImage", title=f"{share:.0%}", width=128, height=128, batch_size=2, color=round(255 * share) * 0x10101
        )
        for share in (0, 1 / 3, 2 / 3, 1)
    ]
    w.group("4b  One after the other", "blue")
    row = greys[0]
    for grey in greys[1:]:
        row = w.add("ImageBatch", image1=row, image2=grey)
    late = w.add("ImageToMask", image=row, channel="red")
    early = w.add("InvertMask", mask=late)
    w.group("4c  Sentences along the frames", "green")
    masked = [
        w.add("ConditioningSetMask", conditioning=said, mask=mask) for said, mask in ((begins, early), (ends, late))
    ]
    both = w.add("ConditioningCombine", conditioning_1=masked[0], conditioning_2=masked[1])
    w.group("5  Edit", "cyan")
    frames = sampled(w, injected(w, tuned.MODEL, described), both, empty, noise, start.vae, steps=MINI_STEPS)
    labels = ["source", f"{first}, then {last.split(' is ')[0]}"]
    result(w, name, start.clip, [start.clip.images, frames], labels, {"edit": frames})
