"""Claims of the suites `mismatch` and `qk`: mismatched optimizers, and effects of QK-clip."""

from collections.abc import Callable, Mapping, Sequence

from experiments.finetune.claims import MEASURES, Contrast, Judged, Verdict
from experiments.finetune.suites.config import GAINS, NO_QK_NORM, PRETRAINED, PROJECTIONS, QK_NORM
from experiments.finetune.suites.results import BY_BASE, TO_ADAMW_BY_BASE, Group
from experiments.report.figures import optimizer_label
from experiments.report.text import number

Clips = Mapping[str, Mapping[str, float]]

_SAME = 1e-3  # relative changes below this count as none
_NEAR = 1.2  # an effective clip brings the largest logit below this × threshold; layers interact


def mismatch(found: Sequence[Contrast]) -> list[Judged]:
    """Tests, for each arm of Muon, whether it degrades AdamW-pretrained models (2605.10468)."""
    judged = []
    for label in dict.fromkeys(optimizer_label(of.arm) for of in found):
        if beside := _of(found, TO_ADAMW_BY_BASE, f"{label}, {PRETRAINED['adamw']}"):
            claim = f"{label} fine-tunes an AdamW-pretrained model worse than AdamW does."
            judged.append(_by_sign(claim, beside))
        if crossed := _of(found, BY_BASE, label):
            claim = f"{label} is worse relative to AdamW there than from a Muon-pretrained model."
            judged.append(_by_sign(claim, crossed))
    return judged


def _by_sign(claim: str, of: Contrast) -> Judged:
    verdicts: dict[int, Verdict] = {1: "agrees", -1: "disagrees", 0: "cannot tell"}
    text = of.text(MEASURES["validation_loss"])
    measured = f"Held-out loss {of.family}: {text}." if of.gaps else ""
    return Judged(claim, measured, verdicts[of.sign], len(of.gaps))


def _of(found: Sequence[Contrast], family: str, name: str) -> Contrast | None:
    return next((of for of in found if (of.family, of.name) == (family, name)), None)


def mismatch_sentences(found: Sequence[Contrast], text: Callable[[Contrast], str]) -> list[str]:
    """Returns sentences with the result of each arm of Muon, and a summary."""
    sentences = []
    for label in dict.fromkeys(optimizer_label(of.arm) for of in found):
        sides = [
            (base, _of(found, TO_ADAMW_BY_BASE, f"{label}, {base}")) for base in PRETRAINED.values()
        ]
        differences = [f"{text(of)} from the {base}" for base, of in sides if of and of.gaps]
        if differences:
            sentences.append(f"{label} minus AdamW: {', '.join(differences)}.")
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
    """Tests whether one clip of the initial models has the expected effects."""
    judged = []
    for name, claim, inert in _EXPECTED:
        if of := clips.get(name):
            moved = abs(of["after"] - of["before"])
            same = moved <= _SAME * of["before"] and of["change"] <= _SAME * of["logits"]
            acts = of["after"] <= _NEAR * of["threshold"]
            verdict: Verdict = "agrees" if (same if inert else acts) else "disagrees"
            judged.append(
                Judged(claim, _clipped(of), verdict if same or acts else "cannot tell", 0)
            )
    return judged


_EXPECTED = (
    (f"{QK_NORM}, {PROJECTIONS}", "With QK-norm, clipping W_q and W_k changes nothing.", True),
    (f"{QK_NORM}, {GAINS}", "With QK-norm, clipping the gains of the norms has an effect.", False),
    (f"{NO_QK_NORM}, {PROJECTIONS}", "Without QK-norm, clipping W_q and W_k has an effect.", False),
)


def _clipped(of: Mapping[str, float]) -> str:
    return (
        f"Clipped at {of['threshold']:g}, the largest attention logit changes from "
        f"{of['before']:.4g} to {of['after']:.4g}, and the output logits (at most "
        f"{of['logits']:.3g}) change by at most {of['change']:.2g}."
    )


def clip_sentences(
    clips: Clips,
    groups: Sequence[Group],
    found: Sequence[Contrast],
    text: Callable[[Contrast], str],
) -> list[str]:
    """Returns sentences on the effects of one clip, and on training with it."""
    sentences = [
        f"{of.claim.rstrip('.')}: this run {of.verdict}. {of.measured}" for of in clip(clips)
    ]
    for norm in (QK_NORM, NO_QK_NORM):
        own = [of for of in groups if of.variant.startswith(f"{norm}, ")]
        threshold = clips.get(f"{norm}, {PROJECTIONS}", {}).get("threshold")
        if own and threshold and all(of.trained for of in own):
            logits = _each(norm, own, Group.last_logit)
            norms = _each(norm, own, Group.gradient_norm)
            sentences.append(
                f"Trained with the clip at {threshold:g}, {norm}: largest attention logit of the "
                f"last steps {logits}; median gradient norm {norms}."
            )
    sentences += [f"Final loss, {of.name} minus no clip: {text(of)}." for of in found if of.gaps]
    return sentences


def _each(norm: str, groups: Sequence[Group], value: Callable[[Group], float]) -> str:
    """Formats a value of every group, as "9.2 with no clip, 4.3 with gains clipped"."""
    return ", ".join(
        f"{number(value(of))} with {of.variant.removeprefix(f'{norm}, ')}" for of in groups
    )


CLIP = (
    "clip",
    "threshold",
    "largest attention logit before",
    "after",
    "largest change of an output logit",
    "largest output logit",
)


def clip_rows(clips: Clips) -> list[list[str]]:
    """Returns the rows of the table of the effects of one clip."""
    forms = {"threshold": "g", "before": ".4g", "after": ".4g", "change": ".2g", "logits": ".3g"}
    return [
        [name, *(f"{of[key]:{form}}" for key, form in forms.items())] for name, of in clips.items()
    ]
