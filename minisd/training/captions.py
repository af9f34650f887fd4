"""The grammar of captions, and the words it can produce."""

import numpy as np

from minisd.training.backgrounds import PLAIN
from minisd.training.catalogue import CATALOGUE, Entry
from minisd.training.sprites import COLORS

PLACE_PHRASES = {
    "meadow": "in a meadow",
    "desert": "in the desert",
    "beach": "on the beach",
    "snow": "in the snow",
    "mountains": "in the mountains",
    "sea": "under the sea",
    "space": "in space",
}
OTHER_PLACE_PHRASES = {"meadow": "on a meadow", "beach": "at the beach", "desert": "in a desert", "sea": "underwater"}
TIME_PHRASES = {"sunset": "at sunset", "night": "at night"}
RELATION_PHRASES = {"left": "to the left of", "right": "to the right of", "above": "above", "next": "next to"}
MIRROR = {"left": "right", "right": "left"}
NUMBERS = {2: "two", 3: "three"}
LOOSE = 0.2  # the share of captions that depart from the canonical form


def caption(
    nouns: list[tuple[str | None, Entry]],
    background: str,
    place: bool,
    time: str,
    relation: str | None,
    count: int,
    rng: np.random.Generator | None = None,
) -> str:
    """Say in words what a scene shows.

    `nouns` are one or two (tint or None, catalogue entry). Without `rng` the caption is canonical, as in
    "a red car to the left of a fox in a meadow at night"; with it, a fifth take a looser form that people
    type too: a synonym, no article, the time first, "and" for "next to", another name for the place, or none.
    """
    looser = LOOSER[rng.integers(len(LOOSER))] if rng is not None and rng.random() < LOOSE else None
    phrases = [_noun_phrase(color, entry, count, looser) for color, entry in nouns]
    link = "and" if looser == "and" and relation == "next" else RELATION_PHRASES.get(relation or "", "")
    subject = f" {link} ".join(phrases)
    if looser == "no background":
        return subject
    where = _where(background, place, looser)
    when = TIME_PHRASES.get(time, "") if place else ""
    if when and looser == "time first":
        return f"{when}, {subject} {where}"
    return " ".join(filter(None, (subject, where, when)))


LOOSER = ("synonym", "no article", "time first", "and", "other place", "no background")


def _noun_phrase(color: str | None, entry: Entry, count: int, looser: str | None) -> str:
    if count > 1:
        return " ".join(filter(None, (NUMBERS[count], color, entry.many)))
    noun = entry.synonym if looser == "synonym" and entry.synonym else entry.noun
    words = " ".join(filter(None, (color, noun)))
    return words if looser == "no article" else f"{article(words)} {words}"


def article(words: str) -> str:
    """The indefinite article that goes before these words."""
    return "an" if words[0] in "aeiou" else "a"


def _where(background: str, place: bool, looser: str | None) -> str:
    if not place:
        color = "grey" if background == "gray" and looser == "other place" else background
        return f"on {article(color)} {color} background"
    if looser == "other place":
        return OTHER_PLACE_PHRASES.get(background, PLACE_PHRASES[background])
    return PLACE_PHRASES[background]


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    phrases = [
        *PLACE_PHRASES.values(),
        *OTHER_PLACE_PHRASES.values(),
        *TIME_PHRASES.values(),
        *RELATION_PHRASES.values(),
        *NUMBERS.values(),
        *PLAIN,
        *COLORS,
        "a an and on background grey",
    ]
    phrases += [word for entry in CATALOGUE for word in (entry.noun, entry.many, entry.synonym)]
    return sorted({word for phrase in phrases for word in phrase.split()})


def mirrored(caption: str) -> str:
    """The caption of the mirror image: left and right exchanged."""
    return " ".join(MIRROR.get(word, word) for word in caption.split(" "))


def colors_exchanged(caption: str) -> str:
    """The caption with the colours of its two objects exchanged; the same one where they don't have two."""
    words = caption.split(" ")
    after = [*words[1:], ""]
    colored = [i for i, word in enumerate(words) if word in COLORS and after[i] != "background"]
    if len(colored) == 2:
        first, second = colored
        words[first], words[second] = words[second], words[first]
        for place in colored:
            if place and words[place - 1] in ("a", "an"):
                words[place - 1] = article(words[place])
    return " ".join(words)
