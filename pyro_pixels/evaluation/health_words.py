"""The findings of `check_health` in words: five lines, the verdict first, for users of scripts or of the library."""

import math
from collections.abc import Mapping
from typing import NamedTuple


class Way(NamedTuple):
    """Something to do, in terms of the library's fields and of the scripts' options."""

    fields: str
    options: str
    only_unstructured: bool = False
    """Whether it helps only where the guide is not structured; to be used within `Either`, beside others."""

    def words(self, *, options: bool, structured: bool) -> str:
        """Returns the words for users of the scripts, or of the library."""
        return self.options if options else self.fields


class Either(NamedTuple):
    """Several ways, of which any may help."""

    ways: tuple[Way, ...]

    def words(self, *, options: bool, structured: bool) -> str:
        """Returns the ways that are left for a run whose guide is structured or not: "a, b, or c"."""
        ways = [way for way in self.ways if not (structured and way.only_unstructured)]
        *others, last = [way.words(options=options, structured=structured) for way in ways]
        return f"{', '.join(others)}, or {last}" if others else last


class InTurn(NamedTuple):
    """A way to be tried first, and what to do if it does not help."""

    first: Way
    then: Either

    def words(self, *, options: bool, structured: bool) -> str:
        """Returns both."""
        first, then = (x.words(options=options, structured=structured) for x in self)
        return f"{first}; if that does not help, {then}"


Advice = Way | Either | InTurn
"""A remedy."""


class Cause(NamedTuple):
    """A likely cause and its remedy."""

    words: str
    advice: Advice


CAUSES: dict[str, Cause] = {
    "white": Cause(
        "images are mostly white, and objects are taken to be bright",
        Way("invert the images: 1 - images", "invert the film (prepare.py --invert)"),
    ),
    "noise": Cause(
        "noise in the images",
        Way(
            "train on these images, for which `fit` estimates it (`Guide.look_at`), or threshold them",
            "train on this film, for which the noise is estimated, or threshold it (prepare.py without --grey)",
        ),
    ),
    "background": Cause(
        "a background that shows",
        Way(
            'subtract it: `load_video(background="median")`, or "local" where it moves',
            "subtract it: prepare.py --background median, or local where it moves",
        ),
    ),
    "come and go": Cause(
        "objects that come and go, or wrong numbers of objects",
        Way(
            "correct `n_objects`, or leave out frames in which objects are missing (`load_video(frames=...)`)",
            "correct their number (prepare.py --n-objects), or cut where they enter and leave (--frames, --crop)",
        ),
    ),
    "walls": Cause(
        "objects that bounce off walls, so their motion is not linear",
        Way(
            "cut sequences shorter than the time between bounces (`load_video(frames=...)`)",
            "cut sequences shorter than the time between bounces (prepare.py --frames)",
        ),
    ),
}

_RESTART = Either((
    Way("train from another seed", "train with another --seed"),
    Way("pick the best of several starts (`fit(candidates=...)`)",
        "pick the best of several starts (train.py --starts 4)"),
))  # fmt: skip
_LONGER = Way(
    "train for more steps after the noises are freed (`Schedule.learn_from`)",
    "train longer (train.py --steps): noises are learned in the last third of the schedule",
)
_STIFFEN = Either((
    Way("start again with a smaller `state_noise` and `position_noise` that are held longer (`Schedule.learn_from`)",
        "train with another --seed or --starts 4"),
    Way("with a structured guide", "with --guide structured", only_unstructured=True),
    Way("from another seed", "longer (--steps)"),
))  # fmt: skip
_STARTS = Way(
    "fit the starts to inferred tracks (`Schedule.fit_starts_at`), or use fewer components if objects start in fewer "
    "ways (`DynamicsConfig.n_components`)",
    "train longer (train.py --steps); this is no fault if objects start in only one way",
)
_NOT_LINEAR = ", or of objects that do not move linearly, e.g. because they bounce off walls: then no training helps"
TOO_SMALL, TOO_LARGE = "innovations too small", "innovations too large"
SIGNS: dict[str, tuple[str, Advice]] = {
    "bound_ratio": (
        "images cost {x:.2f} of what one grey value everywhere would cost (a good run: about 0.2): the renderer does "
        "not draw the images from the inferred positions, unless the pixels are noisy",
        InTurn(Way("train for more steps", "train longer (train.py --steps)"), _RESTART),
    ),
    "innovation_autocorrelation": (
        "innovations of neighbouring frames correlate by {x:.2f} (0 if the dynamics fit): tracks do not follow the "
        f"dynamics, e.g. because of a warped latent space{_NOT_LINEAR}",
        _STIFFEN,
    ),
    "path_residual": (
        "tracks stray from noise-free paths by {x:.2f} of their spread (Sec 3.1's data: 0.1): noise explains what the "
        "dynamics cannot, a sign of a folded or warped latent space (unless the objects' own motion is as random, or "
        f"all of it along one line){_NOT_LINEAR}",
        _STIFFEN,
    ),
    "unexplained_tracks": (
        "{x:.0%} of the tracks do not fit the dynamics that explain the others: identities swap halfway, or objects "
        "are lost",
        _STIFFEN,
    ),
    "smallest_component": (
        "the least used component of the mixture over h_1 has {x:.1%} of the tracks: it is unused",
        _STARTS,
    ),
    "component_certainty": (
        "components are inferred with a mean probability of only {x:.2f}: the components of the mixture over h_1 "
        "overlap and do not stand for different ways to start",
        _STARTS,
    ),
    "coinciding_objects": (
        "in {x:.0%} of the sequences with several objects two of them have nearly the same track: one follows another, "
        "which leaves an object undetected",
        _RESTART,
    ),
    TOO_SMALL: (
        "innovations have a mean square of {x:.2f} (1 if calibrated): Sigma_A, Sigma_H or Sigma_k are larger than the "
        "tracks need, so that predictions are more uncertain than they should be",
        _LONGER,
    ),
    TOO_LARGE: (
        "innovations have a mean square of {x:.2f} (1 if calibrated): the tracks move less regularly than the dynamics "
        "allow, so that predictions are too certain",
        Way(
            "free the noises earlier (`Schedule.learn_from`) or train for more steps; fix other problems first, if any",
            "train longer (train.py --steps); fix other signs first, if any",
        ),
    ),
}
"""Sign of failure -> the words for it, with x for the measure's value, and the remedy."""
DIVERGED = Way(
    "train again with a smaller learning rate or `Schedule.clip_norm`", "train again with another --seed or --preset"
)


def sentence(sign: str, x: float, *, options: bool, structured: bool) -> str:
    """Returns one sentence about a sign, with its remedy for a run whose guide is structured or not."""
    words, advice = SIGNS[sign]
    return f"{words.format(x=x)}; {advice.words(options=options, structured=structured)}"


def five_lines(
    measures: Mapping[str, float], signs: list[str], causes: tuple[str, ...], *, options: bool, structured: bool
) -> list[str]:
    """Returns the verdict, a line each on images, motion and objects, which tell every sign, and the remedy."""
    n = len(signs)
    verdict = "no sign of failure" if not n else f"{n} sign{'s' if n > 1 else ''} of failure"
    if causes:
        verdict += f"; likely cause: {CAUSES[causes[0]].words}"
    ratio = measures.get("bound_ratio")
    images = (
        "grey, so their cost has no scale"
        if ratio is None
        else f"cost {ratio:.2f} of what one grey value everywhere would (good: below 0.5)"
    )
    together = measures["innovation_autocorrelation"]
    motion = f"; errors of neighbouring frames correlate by {together:.2f} (good: -0.3 to 0.3)"
    components = {"component_certainty": ", components overlap", "smallest_component": ", a component is unused"}
    return [
        f"health check: {verdict}",
        f"  images:  {images}",
        f"  motion:  {_errors(measures['innovation_mean_square'])}; noise is {measures['path_residual']:.0%} of the "
        f"extent of tracks (good: below 20%){motion if 'innovation_autocorrelation' in signs else ''}",
        f"  objects: {measures['unexplained_tracks']:.0%} of the tracks lost or exchanged, two on one object in "
        f"{measures['coinciding_objects']:.0%} of the sequences"
        + "".join(words for sign, words in components.items() if sign in signs),
        f"  to do:   {_to_do(signs, causes, options, structured)}",
    ]


def _errors(mean_square: float) -> str:
    ratio = math.sqrt(mean_square) if mean_square >= 0 else math.nan
    return f"prediction errors are {ratio:.2f} times as large as expected (good: 0.7 to 1.4)"


def _to_do(signs: list[str], causes: tuple[str, ...], options: bool, structured: bool) -> str:
    if not signs:
        return "nothing"
    advice = DIVERGED if signs == ["diverged"] else CAUSES[causes[0]].advice if causes else SIGNS[signs[0]][1]
    return advice.words(options=options, structured=structured)
