"""31 to 33: which sampler, which settings, and how good an edit is."""

from tav_core.mini.demo import EDITS, PROMPT
from workflows.graph import Workflow
from workflows.parts import (
    EDIT,
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


def stock_sampler(w: Workflow, name: str):
    sampler, scheduler = "dpmpp_2m", "normal"
    read_me(
        w,
        f"""# Stock sampler

The tuned model is a MODEL like any other, so every sampler works on it. Here the stock *KSampler (Advanced)* draws the edit with **{sampler}** and **{scheduler}**.

What matters:

- *add_noise* is **disabled**: the noise comes from *DDIM Inversion*.
- *steps* and *scheduler* are the same in both nodes, so the sampler starts where the inversion ended.
- *start_at_step* is 0, *return_with_leftover_noise* is disabled.
""",
        410,
    )
    start = source(w)
    described, edit, empty = sentences(w, start.text)
    tuned = tuning(w, start, described, edit)
    noise = inverted(w, tuned.MODEL, start, described, scheduler=scheduler)
    w.group("5  Edit with a stock sampler", "cyan")
    model = injected(w, tuned.MODEL, described)
    said = dict(model=model, positive=edit, negative=empty, latent_image=noise.noise)
    chosen = dict(add_noise="disable", sampler_name=sampler, scheduler=scheduler)
    frames = decoded(w, w.add("KSamplerAdvanced", **said, **chosen, **SAMPLING[True]), start.vae)
    labels = ["source", f"{EDIT} ({sampler}, {scheduler})"]
    result(w, name, start.clip, [start.clip.images, frames], labels, {"edit": frames})


def sweep(w: Workflow, name: str):
    shares, scales = (0.0, 0.6), (2.5, 5.0, 10.0)
    read_me(
        w,
        """# Which guidance, how much injection?

One tuning and one inversion, and six edits side by side: three values of guidance (*cfg* of *Video Sampler*) without attention injection, and the same with it (*share* of *Attention Injection*).

- More **guidance** follows the sentence more and the clip less; too much burns the colours in.
- More **injection** holds layout and motion; too much holds what the edit should change.

Look at the grid, connect the one that you like to *Create Video* of group 7, and it is saved alone. Only what you change is computed anew.

On the command line `--guidance-scale 2.5 5 10 --attention-injection 0 0.6` draws the same grid.
""",
        420,
    )
    start = source(w)
    described, edit, empty = sentences(w, start.text)
    tuned = tuning(w, start, described, edit)
    noise = inverted(w, tuned.MODEL, start, described, measure=False)
    w.group("5a  How much injection", "cyan")
    models = {share: injected(w, tuned.MODEL, described, share=share) for share in shares}
    frames = {}
    for scale in scales:
        w.group(f"5b  Guidance {scale:g}", "cyan")
        for share, model in models.items():
            title = f"cfg {scale:g}, share {share:g}"
            frames[title] = sampled(w, model, edit, empty, noise, start.vae, cfg=scale, title=title)
    order = sorted(frames, key=lambda title: title.rpartition(" ")[2])  # a row for each share
    chosen = "cfg 5, share 0.6"
    result(w, name, start.clip, [frames[title] for title in order], order, {"chosen": frames[chosen]})


def metrics(w: Workflow, name: str):
    read_me(
        w,
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
    start = source(w)
    w.group("2b  Sentences", "green", below=True)
    described = sentence(w, start.text, "What the clip shows", PROMPT)
    edit = sentence(w, start.text, "What it should show", EDITS["colour"])
    empty = nothing(w, start.text)
    tuned = tuning(w, start, described, edit)
    noise, subject = found_subject(w, tuned, start, described)
    w.group("5  Edit the subject", "cyan")
    model = injected(w, tuned.MODEL, described, region="subject", subject=subject)
    drawn = sampled(w, model, edit, empty, noise, start.vae)
    frames = put_back(w, drawn, start, subject, "subject")
    w.group("6  Measure", "red", 400)
    figures = dict(prompt=EDITS["colour"], source_prompt=PROMPT, clip_model="mini", mask=subject)
    measured = w.add("TAVMeasure", images=frames, source=start.clip.images, **figures)
    w.add("PreviewAny", title="Figures", source=measured.table)
    w.add("SaveImage", title="Along the frames", images=measured.plot, filename_prefix=f"{name}-plot")
    result(w, name, start.clip, [start.clip.images, frames], ["source", EDITS["colour"]], {"edit": frames}, number=7)
