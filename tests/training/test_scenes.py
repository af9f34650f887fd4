"""Scenes: held-out pairs, determinism, grammar, geometry and colour, checked from captions and pixels."""

import colorsys
import hashlib

import numpy as np
import pytest

from minisd.training import scenes
from minisd.training.backgrounds import FRAME, background
from minisd.training.catalogue import CATALOGUE, Paint
from minisd.training.scenes import Mixture, Scene, Thing, flipped, render, scene
from minisd.training.sprites import COLORS, atlas, extent, paint_mask, sprite

MANY = {
    "foxes": "fox",
    "butterflies": "butterfly",
    "strawberries": "strawberry",
    "snowmen": "snowman",
    "fish": "fish",
    "octopuses": "octopus",
    "cactuses": "cactus",
    "buses": "bus",
    "penguins": "penguin",
    "tulips": "tulip",
}
PHRASES = {
    "in the snow": "snow",
    "under the sea": "sea",
    "on the beach": "beach",
    "in space": "space",
    "in a meadow": "meadow",
    "in the desert": "desert",
    "in the mountains": "mountains",
}


@pytest.fixture(scope="module")
def training() -> list[Scene]:
    return [scene(7, index) for index in range(20_000)]


@pytest.fixture(scope="module")
def held_out() -> list[Scene]:
    return [scene(7, index, held_out=True) for index in range(1_000)]


def words_of(described: Scene) -> set[tuple[str, str]]:
    """The pairs that a caption names, read from its words alone."""
    nouns = {plural: noun for noun, plural in ((entry.noun, entry.many) for entry in CATALOGUE)}
    nouns |= {entry.noun: entry.noun for entry in CATALOGUE}
    subject = described.caption.split(" on a ")[0].split(" on an ")[0].split()
    place = next((name for phrase, name in PHRASES.items() if phrase in described.caption), None)
    found = set()
    for before, word in zip(["", *subject], subject, strict=False):
        if word in nouns and before in COLORS:
            found.add((before, nouns[word]))
        if word in nouns and place:
            found.add((nouns[word], place))
    return found


def test_held_out_pairs_never_occur_in_training(training):
    forbidden = scenes.held_out_pairs()
    assert not [s.caption for s in training if words_of(s) & forbidden]
    assert not [s.caption for s in training if scenes.pairs(s) & forbidden]


def test_every_held_out_scene_names_a_held_out_pair(held_out):
    forbidden = scenes.held_out_pairs()
    assert all(words_of(s) & forbidden for s in held_out)
    assert set().union(*(words_of(s) & forbidden for s in held_out)) == forbidden


def test_about_a_tenth_is_held_out_and_examples_are_not():
    forbidden, every = scenes.held_out_pairs(), scenes.all_pairs()
    assert 0.08 < len(forbidden) / len(every) < 0.12
    assert not forbidden & {
        ("fox", "snow"),
        ("panda", "snow"),
        ("red", "car"),
        ("car", "beach"),
        ("blue", "balloon"),
        ("rocket", "space"),
        ("penguin", "snow"),
        ("dolphin", "sea"),
        ("castle", "snow"),
    }


def test_the_pairs_held_out_stay_the_same_for_good():
    listed = "\n".join(sorted("|".join(pair) for pair in scenes.held_out_pairs()))
    assert hashlib.sha256(listed.encode()).hexdigest()[:16] == "3a8b8eaf53060ee8"


def test_training_covers_every_other_pair(training):
    seen = set().union(*(scenes.pairs(s) for s in training))
    # a few are impossible: what the place would hide
    assert len(scenes.all_pairs() - scenes.held_out_pairs() - seen) == 0


def test_objects_are_balanced(training):
    nouns = [thing.noun for s in training for thing in s.things[:1]]
    counts = np.array([nouns.count(name) for name in scenes.object_names()])
    assert counts.min() > 0.75 * counts.mean() and counts.max() < 1.25 * counts.mean()


def test_the_mixture_is_as_asked(training):
    kinds = [(s.relation is None and s.count == 1, s.relation is not None, s.count > 1) for s in training]
    np.testing.assert_allclose(np.mean(kinds, 0), [0.6, 0.25, 0.15], atol=0.02)
    assert all(scene(1, i, mixture=Mixture(0, 0, 1)).count in (2, 3) for i in range(100))
    with pytest.raises(ValueError, match="not all zero"):
        Mixture(0, 0, 0)


def test_scenes_are_random_access_and_deterministic():
    forwards = [scene(3, index) for index in range(6)]
    assert [scene(3, index) for index in reversed(range(6))] == forwards[::-1]
    assert scene(4, 0) != forwards[0]
    assert all(np.array_equal(render(s), render(s)) for s in forwards)
    assert render(forwards[0]).shape == (192, 192, 3) and render(forwards[0]).dtype == np.uint8


def test_captions_are_correct_english(training):
    for s in training:
        words = s.caption.replace(",", "").split()
        for article, word in zip(words, words[1:], strict=False):
            if article in ("a", "an"):
                assert (article == "an") == (word[0] in "aeiou"), s.caption
        if s.count > 1:
            assert ("two" if s.count == 2 else "three") in words and len(s.things) == s.count
            assert s.things[0].noun not in words or s.things[0].noun == "fish", s.caption
    many = {
        s.caption.split()[1]: s.things[0].noun
        for s in training
        if s.count > 1 and s.things[0].color is None and s.caption.startswith(("two ", "three "))
    }
    assert {plural: many[plural] for plural in MANY} == MANY


def test_the_vocabulary_is_exactly_the_words_of_captions(training):
    used = {word for s in training for word in s.caption.replace(",", "").split()}
    assert used <= set(scenes.vocabulary())
    assert set(scenes.vocabulary()) - used == set()


def test_relations_hold_in_the_picture(training):
    for s in training:
        if s.relation:
            first, second = s.things
            assert first.noun != second.noun
            if s.relation == "left":
                assert first.x + 20 < second.x and "to the left of" in s.caption
            if s.relation == "right":
                assert first.x > second.x + 20 and "to the right of" in s.caption
            if s.relation == "above":
                assert first.y + 20 < second.y and abs(first.x - second.x) <= 20 and "above" in s.caption


def test_things_lie_inside_and_never_on_their_own_colour(training):
    for s in training:
        for thing in s.things:
            width, height = extent(thing.noun, thing.size)
            assert width / 2 <= thing.x <= FRAME - width / 2 and height / 2 <= thing.y <= FRAME - height / 2, s
            assert s.place or thing.color != s.background


def test_worlds_are_sensible(training):
    swimmers = {"fish", "dolphin", "octopus", "whale", "crab", "turtle", "robot"}
    for s in training:
        nouns = {thing.noun for thing in s.things}
        assert s.background != "sea" or nouns <= swimmers
        assert not (nouns & {"fish", "dolphin", "whale"} and s.place and s.background != "sea")
        assert s.time == "day" or s.background not in ("sea", "space")
        standing = [t for t in s.things if t.noun in ("fox", "car", "house", "tree")]
        if s.place and s.background in ("meadow", "snow", "beach", "desert", "mountains"):
            assert all(t.y + extent(t.noun, t.size)[1] / 2 > 85 for t in standing), s


def test_mirroring_swaps_pixels_and_words():
    s = next(s for s in (scene(1, i) for i in range(500)) if s.relation == "left")
    mirror = flipped(s)
    assert "right" in mirror.caption and "left" not in mirror.caption and mirror.relation == "right"
    assert np.array_equal(render(mirror), render(s)[:, ::-1])
    assert mirror.things[0].x > mirror.things[1].x
    assert flipped(mirror) == s


@pytest.mark.parametrize("entry", [e for e in CATALOGUE if e.paint], ids=lambda e: e.noun)
def test_a_tint_is_visibly_its_colour(entry):
    hues = {"red": 0, "orange": 30, "yellow": 48, "green": 122, "blue": 218, "purple": 268, "pink": 335}
    before = np.asarray(atlas()[entry.noun], dtype=np.float32)
    mask = (paint_mask(before[..., :3] / 255, entry.paint) > 0.9) & (before[..., 3] > 250)
    assert mask.sum() > 0.12 * (before[..., 3] > 250).sum()
    for color in entry.colors:
        after = np.asarray(sprite(entry.noun, color), dtype=np.float32)[..., :3]
        hue, saturation, value = colorsys.rgb_to_hsv(*(np.median(after[mask], axis=0) / 255))
        if color == "white":
            assert saturation < 0.1 and value > 0.8
        elif color == "black":
            assert value < 0.35
        else:
            assert abs((hue * 360 - hues[color] + 180) % 360 - 180) < 12 and saturation > 0.35
        untouched = (paint_mask(before[..., :3] / 255, entry.paint) == 0) & (before[..., 3] == 255)
        np.testing.assert_allclose(after[untouched], before[..., :3][untouched], atol=1)


def test_paint_wraps_around_red():
    pixels = np.array([[[1, 0.1, 0.2], [1, 0.2, 0.1], [0.1, 1, 0.1], [0.1, 0.1, 1]]], dtype=np.float32)
    assert paint_mask(pixels, Paint(hue=(330, 30))).round().tolist() == [[1, 1, 0, 0]]


def test_a_sprite_is_composed_over_its_background():
    # by hand: far from the sprite the background shows, at the heart's centre the heart does
    heart = Thing("heart", "blue", 64, 64, 60, False)
    s = Scene("a blue heart on a white background", (heart,), "white", False, "day", None, 1, 0)
    picture = render(s)
    assert np.array_equal(picture[:20], background("white", "day", 0)[:20].clip(0, 255).round())
    red, green, blue = picture[96, 96].astype(int)
    assert blue > 180 and blue > red + 100 and blue > green + 60


def test_backgrounds_vary_with_the_seed_only_in_places():
    assert np.array_equal(background("red", "day", 1), background("red", "day", 2))
    for place in scenes.places():
        assert not np.array_equal(background(place, "day", 1), background(place, "day", 2))
    night, day = (background("meadow", time, 1)[:40].mean() for time in ("night", "day"))
    assert night < 0.5 * day
    with pytest.raises(ValueError, match="unknown background 'moon'"):
        background("moon", "day", 0)


def test_an_object_without_paint_refuses_a_colour():
    with pytest.raises(ValueError, match="a fox takes no colour"):
        sprite("fox", "blue")
