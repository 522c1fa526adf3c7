"""01 to 05: a first edit, and others of the same clip."""

from tav_core.mini.demo import EDITS, PROMPT
from workflows.graph import Workflow
from workflows.parts import (
    EDIT,
    OWN,
    SAMPLING,
    SAVED,
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

PEOPLE = ("a man is skiing", "spider man is skiing on the beach, cartoon style")


def one_shot(w: Workflow, name: str, mini: bool):
    start = source(w, mini)
    words = (PROMPT, EDIT) if mini else PEOPLE
    described, edit, empty = sentences(w, start.text, *words)
    tuned = tuning(w, start, described, edit, mini)
    if not mini:
        w.group("Keep", "yellow", 380, below=True)
        w.add("TAVSaveTunedWeights", tuned_weights=tuned.tuned_weights, name=OWN, prompt=words[0])
    noise = inverted(w, tuned.MODEL, start, described if mini else empty, mini)
    w.group("5  Edit", "cyan")
    model = injected(w, tuned.MODEL, described) if mini else tuned.MODEL  # 03 is the paper, to the letter
    frames = sampled(w, model, edit, empty, noise, start.vae, mini)
    result(w, name, start.clip, [start.clip.images, frames], ["source", words[1]], {"edit": frames})


def mini_edit(w: Workflow, name: str):
    read_me(
        w,
        f"""# One-shot edit

Press **Run**. Everything needed ships with the pack, and a CPU is enough.

1. A clip of 8 frames and a small checkpoint are loaded.
2. *Inflate* makes an image model see all frames at once. One sentence says what the clip shows, another what it should show.
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
        600,
    )
    one_shot(w, name, mini=True)


def sd15_edit(w: Workflow, name: str):
    read_me(
        w,
        f"""# One-shot edit with Stable Diffusion 1.5

The graph of 01 with the stock *Load Checkpoint* and the settings of the paper. Before you run it:

1. **Load Video**: upload your clip with the button, and choose *start*, *stride* and *count* so that 8 to 24 frames show the motion.
2. **Load Checkpoint**: choose a Stable Diffusion 1.x checkpoint (2.1 works as well, at 768 x 768).
3. **What the clip shows**: one plain sentence about your clip.
4. **What it should show**: the same sentence with other words.

500 steps at a learning rate of 0.00003, 50 steps of inversion and sampling, cfg 12.5. A GPU is needed; with 12 GB keep *count* at 8.

*Save Tuned Weights* keeps what was learned as `models/tune_a_video/{OWN}.safetensors`: workflow 05 uses it without tuning.

LoRAs go between *Load Checkpoint* and *Inflate*. If an edit loses the motion, put *Attention Injection* before *Video Sampler* (workflow 01 shows how), or lower *cfg*.
""",
        600,
    )
    one_shot(w, name, mini=False)


def four_edits(w: Workflow, name: str):
    read_me(
        w,
        f"""# Four edits from one tuning

The clip is tuned and inverted once. From the same noise four samplers draw four kinds of edit: another **subject**, another **colour**, another **place**, another **style**.

*Save Tuned Weights* keeps what was learned as `models/tune_a_video/{SAVED}.safetensors`, and *Save Inverted Noise* what was inverted as `output/noise/{SAVED}.safetensors`: workflow 04 uses both, without tuning and inversion. The command line reads these files as well.

If you ran 01 before, the tuning isn't repeated.
""",
        380,
    )
    start = source(w)
    w.group("2b  Sentences", "green", below=True)
    described, empty = sentence(w, start.text, "What the clip shows", PROMPT), nothing(w, start.text)
    edits = {kind: sentence(w, start.text, f"Another {kind}", text) for kind, text in EDITS.items()}
    tuned = tuning(w, start, described, edits["background"])
    w.group("Keep", "yellow", 380, below=True)
    w.add("TAVSaveTunedWeights", tuned_weights=tuned.tuned_weights, name=SAVED, prompt=PROMPT)
    noise = inverted(w, tuned.MODEL, start, described)
    model = injected(w, tuned.MODEL, described)
    frames = []
    for kind, edit in edits.items():
        if kind in ("subject", "background"):
            w.group("5a  Edit the subject" if kind == "subject" else "5b  Edit the rest", "cyan")
        title = f"Video Sampler: {kind}"
        frames.append(sampled(w, model, edit, empty, noise, start.vae, title=title))
        if kind == "colour":
            w.group("Keep", "yellow", below=True)
            found = dict(model=tuned.MODEL, clip=start.text, noise=noise.noise, sigmas=noise.sigmas)
            clip = dict(images=start.clip.images, fps=start.clip.fps, audio=start.clip.audio)
            w.add("TAVSaveInvertedNoise", **found, prompt=PROMPT, name=SAVED, **clip)
    result(w, name, start.clip, [start.clip.images, *frames], ["source", *EDITS], dict(zip(EDITS, frames)))


def reuse(w: Workflow, name: str):
    read_me(
        w,
        f"""# Tuned and inverted before

No tuning and no inversion here. **Run 02 first**: its *Save Tuned Weights* and *Save Inverted Noise* write the files that are loaded here, `models/tune_a_video/{SAVED}.safetensors` and `output/noise/{SAVED}.safetensors`. If a list is empty, press **R** to refresh it.

Checkpoint, LoRAs and the settings of *Inflate* must be those of the tuning. The clip is in the file of the noise, with its sentence, rate and sound; the negative sentence is the only one that is missing besides the edit.

The weights and the noise that `tune-a-video edit` writes are loaded in the same way.
""",
        420,
    )
    w.group("1  Checkpoint", "blue")
    checkpoint = w.add("TAVLoadCheckpoint")
    loaded = w.add("TAVLoadTunedWeights", file=f"{SAVED}.safetensors")
    w.group("2a  Use what was tuned", "purple")
    inflated = w.add("TAVInflate", model=checkpoint.MODEL)
    tuned = w.add("TAVApplyTunedWeights", model=inflated, tuned_weights=loaded.tuned_weights)
    w.group("2b  Sentences", "green", below=True)
    edit = sentence(w, checkpoint.CLIP, "What it should show", EDITS["style"])
    empty = nothing(w, checkpoint.CLIP)
    w.group("3  Load what was inverted", "cyan")
    noise = w.add("TAVLoadInvertedNoise", file=f"noise/{SAVED}.safetensors [output]", model=tuned, clip=checkpoint.CLIP)
    w.add("PreviewAny", title="What the clip shows", source=noise.prompt)
    w.group("4  Edit", "cyan")
    model = injected(w, tuned, noise.conditioning)
    frames = sampled(w, model, edit, empty, noise, checkpoint.VAE)
    result(w, name, noise, [noise.images, frames], ["source", EDITS["style"]], {"edit": frames})


def reuse_sd15(w: Workflow, name: str):
    read_me(
        w,
        f"""# Tuned weights of your clip, again

No tuning here: the weights come from `models/tune_a_video/{OWN}.safetensors`, which *Save Tuned Weights* of workflow 03 writes; so does `tune-a-video edit`, as `tuned.safetensors`. If the list of *Load Tuned Weights* is empty, press **R** to refresh it.

Checkpoint, LoRAs and the settings of *Inflate* must be those of the tuning, and the clip must have as many frames. *Load Tuned Weights* also gives the sentence of the tuning, by which the clip is inverted here.

Two edits come from one inversion. *Attention Injection* holds them to the clip's layout and motion; lower *share* for a freer edit.
""",
        420,
    )
    start = source(w, mini=False)
    w.group("1c  What was tuned", "purple", below=True)
    loaded = w.add("TAVLoadTunedWeights", file=f"{OWN}.safetensors")
    w.group("2c  Sentences", "green")
    described = sentence(w, start.text, "What the clip shows", loaded.prompt)
    edits = {"subject": "spider man is skiing", "style": "a man is skiing, watercolour painting"}
    wanted = {kind: sentence(w, start.text, f"Another {kind}", text) for kind, text in edits.items()}
    empty = nothing(w, start.text)
    w.group("3  Use what was tuned", "purple")
    tuned = w.add("TAVApplyTunedWeights", model=start.model, tuned_weights=loaded.tuned_weights)
    noise = inverted(w, tuned, start, described, mini=False)
    model, frames = injected(w, tuned, described), []
    for part, (kind, edit) in zip("ab", wanted.items()):
        w.group(f"5{part}  Another {kind}", "cyan")
        frames.append(sampled(w, model, edit, empty, noise, start.vae, mini=False, cfg=SAMPLING[False]["cfg"] - 3))
    labels = ["source", *edits.values()]
    result(w, name, start.clip, [start.clip.images, *frames], labels, dict(zip(edits, frames)))
