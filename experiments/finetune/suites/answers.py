"""What the suites answer beside the post's claims: mismatched optimizers, and what QK-clip does."""

from collections.abc import Callable, Mapping, Sequence

from experiments.finetune.claims import MEASURES, Judged, Verdict, difference_text
from experiments.finetune.suites.config import GAINS, NO_QK_NORM, PRETRAINED, PROJECTIONS, QK_NORM
from experiments.finetune.suites.results import BY_BASE, TO_ADAMW_BY_BASE, Contrast, Group
from experiments.report.figures import optimizer_label
from experiments.report.text import number

Clips = Mapping[str, Mapping[str, float]]

_SAME = 1e-3  # a change below this share is none
_NEAR = 1.2  # of the threshold: whereto a clip that acts brings the largest logit; layers interact


def mismatch(found: Sequence[Contrast]) -> list[Judged]:
    """Whether Muon degrades what AdamW pretrained, as 2605.10468 has it, for each arm of Muon."""
    judged = []
    for arm in dict.fromkeys(of.arm for of in found):
        label = optimizer_label(arm)
        beside = _of(found, TO_ADAMW_BY_BASE, f"{label}, {PRETRAINED['adamw']}")
        crossed = _of(found, BY_BASE, label)
        claims = (
            (f"{label} fine-tunes an AdamW-pretrained model worse than AdamW does.", beside),
            (
                f"{label} is worse relative to AdamW there than from a Muon-pretrained model.",
                crossed,
            ),
        )
        judged += [_by_sign(claim, of) for claim, of in claims if of]
    return judged


def _by_sign(claim: str, of: Contrast) -> Judged:
    verdicts: dict[int, Verdict] = {1: "agrees", -1: "disagrees", 0: "cannot tell"}
    text = difference_text(MEASURES["validation_loss"], of.mean, of.interval)
    measured = f"Held-out loss {of.family}: {text}." if of.gaps else ""
    return Judged(claim, measured, verdicts[of.sign], len(of.gaps))


def _of(found: Sequence[Contrast], family: str, name: str) -> Contrast | None:
    return next((of for of in found if (of.family, of.name) == (family, name)), None)


def mismatch_sentences(found: Sequence[Contrast], text: Callable[[Contrast], str]) -> list[str]:
    """What came out for each arm of Muon, and what that says of 2605.10468."""
    sentences = []
    for arm in dict.fromkeys(of.arm for of in found):
        label = optimizer_label(arm)
        sides = [
            (base, _of(found, TO_ADAMW_BY_BASE, f"{label}, {base}")) for base in PRETRAINED.values()
        ]
        told = [f"{text(of)} from the {base}" for base, of in sides if of and of.gaps]
        if told:
            sentences.append(f"{label} minus AdamW: {', '.join(told)}.")
    crossed = [of for of in found if of.family == BY_BASE and of.p is not None]
    if crossed:
        worse, better = (sum(of.sign == sign for of in crossed) for sign in (1, -1))
        forms = "form" if len(crossed) == 1 else "forms"
        sentences.append(
            f"Of {len(crossed)} {forms} of Muon, {worse} are worse relative to AdamW from the "
            f"AdamW base than from the Muon base, and {better} better, at p < 0.05 after Holm's "
            "correction."
        )
    return sentences


def clip(clips: Clips) -> list[Judged]:
    """Whether one clip does what is expected of it, by the models that the cells begin with."""
    found = []
    for name, claim, inert in _EXPECTED:
        if of := clips.get(name):
            same = (
                abs(of["after"] - of["before"]) <= _SAME * of["before"]
                and of["change"] <= _SAME * of["logits"]
            )
            acts = of["after"] <= _NEAR * of["threshold"]
            told: dict[bool, Verdict] = {True: "agrees", False: "disagrees"}
            verdict = told[same if inert else acts] if same or acts else "cannot tell"
            found.append(Judged(claim, _clipped(of), verdict, 0))
    return found


_EXPECTED = (
    (f"{QK_NORM}, {PROJECTIONS}", "With QK-norm, clipping W_q and W_k changes nothing.", True),
    (f"{QK_NORM}, {GAINS}", "With QK-norm, clipping the gains of the norms has an effect.", False),
    (f"{NO_QK_NORM}, {PROJECTIONS}", "Without QK-norm, clipping W_q and W_k has an effect.", False),
)


def _clipped(of: Mapping[str, float]) -> str:
    return (
        f"Clipped at {of['threshold']:g}, the largest attention logit changes from "
        f"{of['before']:.4g} to {of['after']:.4g}, and the output logits, up to "
        f"{of['logits']:.3g}, by {of['change']:.2g} at most."
    )


def clip_sentences(
    clips: Clips,
    groups: Sequence[Group],
    found: Sequence[Contrast],
    text: Callable[[Contrast], str],
) -> list[str]:
    """What one clip changes, and what training with it comes to."""
    sentences = [
        f"{of.claim.rstrip('.')}: this run {of.verdict}. {of.measured}" for of in clip(clips)
    ]
    for norm in (QK_NORM, NO_QK_NORM):
        own = [of for of in groups if of.variant.startswith(f"{norm}, ")]
        at = clips.get(f"{norm}, {PROJECTIONS}", {}).get("threshold")
        if own and at and all(of.trained for of in own):
            logits = _each(norm, own, Group.last_logit)
            norms = _each(norm, own, Group.gradient_norm)
            sentences.append(
                f"Trained with the clip at {at:g}, {norm}: largest attention logit of the last "
                f"steps {logits}; median norm of the gradient {norms}."
            )
    sentences += [f"Final loss, {of.name} minus no clip: {text(of)}." for of in found if of.gaps]
    return sentences


def _each(norm: str, groups: Sequence[Group], value: Callable[[Group], float]) -> str:
    """A value of every group, as "9.2 with no clip, 4.3 with gains clipped"."""
    return ", ".join(
        f"{number(value(of))} with {of.variant.removeprefix(f'{norm}, ')}" for of in groups
    )


CLIP = (
    "clip",
    "threshold",
    "largest attention logit before",
    "after",
    "largest change of a prediction's logit",
    "largest such logit",
)


def clip_rows(clips: Clips) -> list[list[str]]:
    """The table of what one clip changes."""
    return [
        [
            name,
            f"{of['threshold']:g}",
            f"{of['before']:.4g}",
            f"{of['after']:.4g}",
            f"{of['change']:.2g}",
            f"{of['logits']:.3g}",
        ]
        for name, of in clips.items()
    ]
