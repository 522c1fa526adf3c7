"""Presets: the settings of a whole edit, from tuning to sampling."""

from dataclasses import dataclass, fields, replace

from .ddim import Guidance
from .errors import TavError
from .limits import check_fields
from .tuning import TuneConfig
from .windows import ContextWindows


@dataclass(frozen=True)
class Preset:
    """Settings of a whole edit. The limits of numbers stand in `limits`.

    Attributes:
        tuning: those of the tuning.
        sampling_steps: DDIM steps of inversion and of sampling alike, 1 ... 1000 (the paper: 50).
        guidance_scale: of classifier-free guidance, 0 ... 100; at most 1 there is none (the paper: 12.5).
        attention_injection: share of the sampling steps in which the edit attends as the clip does, 0 ... 1: more
            keeps more of its layout and motion (see `injection`; 0 in the paper).
        guidance_scale, guidance_rescale, guidance_start, guidance_end: see `Guidance`.
        caption_as_negative: how much of the negative prompt is the clip's own sentence, 0 ... 1: guidance then
            follows what an edit changes in it, and the clip is inverted with it. 0 is the paper, 1 negative-prompt
            inversion (arXiv 2305.16807).
        steady: with a mask of the subject, a background that an edit draws anew stands still where the clip's does (see
            `steadied`), and a subject is the same in all frames (see `agreed`). Turn it off for what should move
            otherwise, such as a fire or a crowd.
        eta: share of fresh noise in the steps of an edit, 0 ... 1: 0 is DDIM as in the paper, which leaves nothing to
            chance, 1 has as much of it as DDPM (Song et al., equation 16). More of it draws more freely.
        context_overlap: frames that neighbouring windows share; with `tuning.context_length` all stages see a clip
            window by window (see `windows`).
        edits_at_once: how many edits of a clip are drawn together at most, which is faster and takes more memory; it
            changes nothing but rounding. None: as many as there is memory for (see `drawing`).
    """

    tuning: TuneConfig
    sampling_steps: int = 50
    guidance_scale: float = 12.5
    guidance_rescale: float = 0.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    attention_injection: float = 0.0
    caption_as_negative: float = 0.0
    steady: bool = True
    eta: float = 0.0
    context_overlap: int = 4
    edits_at_once: int | None = None

    def __post_init__(self):
        check_fields(self)
        Guidance(self.guidance_scale, self.guidance_rescale, self.guidance_start, self.guidance_end)
        if self.tuning.context_length is not None:
            ContextWindows(self.tuning.context_length, self.context_overlap)


# section 4 of the paper and the authors' configuration files
_PAPER = Preset(TuneConfig(steps=500, learning_rate=3e-5), sampling_steps=50, guidance_scale=12.5)
PRESETS = {
    "paper": _PAPER,
    # attention follows the source in the first half of 50 steps under guidance of 7.5, as in Plug-and-Play (arXiv
    # 2211.12572); with a part of negative-prompt inversion (arXiv 2305.16807)
    "edit": replace(_PAPER, guidance_scale=7.5, attention_injection=0.5, caption_as_negative=0.25),
    # found with `python -m tav_core.mini benchmark`: the small checkpoint wants to learn fast; a large one doesn't
    "mini": Preset(
        TuneConfig(steps=200, learning_rate=2e-3, timestep_sampling="stratified"),
        sampling_steps=25,
        guidance_scale=5.0,
        attention_injection=0.6,
        caption_as_negative=0.25,
    ),
}


def default_preset(checkpoint_name: str) -> str:
    """The name of the preset that a checkpoint gets unless told otherwise: a real one that of the paper, whose results
    are published.
    """
    return "mini" if checkpoint_name == "mini" else "paper"


def with_settings(preset: Preset, **changes) -> Preset:
    """A preset with some of its settings, or of its tuning's, replaced; None keeps the preset's own.

    Args:
        changes: fields of `Preset` and of `TuneConfig` by their names, such as `steps` and `guidance_scale`.

    Raises:
        TavError: a setting that there isn't, or a value out of range.
    """
    own, of_tuning = ({each.name for each in fields(of)} - {"tuning"} for of in (Preset, TuneConfig))
    if unknown := sorted(changes.keys() - own - of_tuning):
        raise TavError(unknown[0], None, "is no setting", f"choose among {', '.join(sorted(own | of_tuning))}")
    given = {name: value for name, value in changes.items() if value is not None}
    tuning = replace(preset.tuning, **{name: value for name, value in given.items() if name in of_tuning})
    return replace(preset, tuning=tuning, **{name: value for name, value in given.items() if name in own})
