"""Captions: only known words, and every word true."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastldm.scenes import (
    COLOURS,
    KINDS,
    LANDSCAPES,
    SKIES,
    STYLES,
    VOCABULARY,
    caption,
    caption_and_facts,
    draw_scene,
    sample_scene,
    scene_labels,
)
from fastldm.scenes.captions import EVALUATION_PHRASINGS, FACTS, MAX_WORDS, phrase, words
from fastldm.scenes.vocabulary import NOUNS

COLOUR_OF = {colour: colour for colour in COLOURS} | {"violet": "purple"}
SIZE_OF = {"tiny": "small", "little": "small", "big": "large", "huge": "large", "middle sized": "medium"}
SIZE_OF |= {size: size for size in ("small", "medium", "large")}
KIND_OF = {form: kind for kind, names in NOUNS.items() for name in names for form in name}
PLACES = (
    r"(?:on|at|to) the (left|right)(?! of)|(?:at|near) the (top|bottom)"
    r"|in the (upper|lower)|(?:in|at) the (middle|cent)"
)
PLACE_OF = {"upper": "top", "lower": "bottom", "middle": "centre", "cent": "centre"}
SKY_WORDS = {"day": "day", "daytime": "day", "sunset": "sunset", "evening": "sunset", "night": "night"}
SKY_WORDS |= {"sunny": "day", "starry": "night"}
LANDSCAPE_WORDS = {name: name for name in LANDSCAPES} | {"grassy": "meadow", "grass": "meadow"}
LANDSCAPE_WORDS |= {
    "snowy": "snow",
    "ocean": "sea",
    "water": "sea",
    "dunes": "desert",
    "sandy beach": "beach",
}
STYLE_WORDS = {"flat": "flat", "pixel": "pixel", "pixelated": "pixel", "pixels": "pixel"}
STYLE_WORDS |= {"watercolour": "watercolour", "watercolor": "watercolour"}
STYLE_WORDS |= dict.fromkeys(("outlined", "outline", "outlines", "line"), "outlined")
NUMBER_OF = {"pair": 2, "couple": 2, "two": 2, "three": 3, "four": 4, "2": 2, "3": 3, "4": 4}


def found(table, text):
    """The meanings of the table's words in the text, in order, the longest word first."""
    names = "|".join(sorted(map(re.escape, table), key=len, reverse=True))
    return [table[match] for match in re.findall(rf"\b({names})\b", text)]


def captioned(seed, number, **facts):
    rng = np.random.default_rng(seed)
    for _ in range(number):
        scene = sample_scene(rng, **facts)
        yield scene, *caption_and_facts(scene, rng)


def test_captions_use_only_the_vocabulary():
    rng = np.random.default_rng(0)
    used = set()
    for i in range(400):
        scene = sample_scene(rng, 1 + i % 4, alike=i % 3 == 0)
        for _ in range(10):
            used |= set(words(caption(scene, rng)))
    assert used <= set(VOCABULARY)
    assert len(used) >= 90


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_captions_of_every_stage_are_short_and_within_the_vocabulary(seed, stage):
    rng = np.random.default_rng(seed)
    text, told = caption_and_facts(draw_scene(rng, stage), rng)
    assert len(words(text)) <= MAX_WORDS
    assert set(words(text)) <= set(VOCABULARY)
    assert told <= set(FACTS) | {"count", "relation", "sky", "style"}


def test_longest_captions_leave_facts_out_and_never_an_object():
    left_out = 0
    rng = np.random.default_rng(0)
    for _ in range(400):
        scene = sample_scene(rng, 4, sky="night", style="watercolour", size="medium")
        text, told = caption_and_facts(scene, rng)
        assert len(words(text)) <= MAX_WORDS
        kinds = found(KIND_OF, text)
        assert set(kinds) == {thing.kind for thing in scene.objects}, text
        left_out += "colour" in told and not told & {"size", "background", "sky"}
    assert left_out > 0


@pytest.mark.parametrize("style", STYLES)
def test_landscape_sky_and_style_are_told_truly(style):
    seen = set()
    for scene, text, told in captioned(7, 500, sky=None, background="desert", style=style):
        check_scenery(scene, text, told)
    rng = np.random.default_rng(8)
    for _ in range(600):
        sky = SKIES[int(rng.integers(3))]
        scene = sample_scene(rng, sky=sky, style=style)
        text, told = caption_and_facts(scene, rng)
        check_scenery(scene, text, told)
        seen |= told
    assert {"sky", "background", "style"} <= seen


def check_scenery(scene, text, told):
    def said(table, fact, truth):
        assert set(found(table, text)) == ({truth} if fact in told else set()), text

    said(LANDSCAPE_WORDS, "background", scene.background)
    said(SKY_WORDS, "sky", scene.sky)
    said(STYLE_WORDS, "style", scene.style)


@pytest.mark.parametrize("style", STYLES[1:])
def test_an_untold_style_is_mostly_flat(style):
    untold = {
        style: sum("style" not in told for _, _, told in captioned(9, 300, style=style))
        for style in ("flat", style)
    }
    assert untold["flat"] > 5 * untold[style]


def test_vocabulary_is_sorted_unique_and_plain():
    assert list(VOCABULARY) == sorted(set(VOCABULARY))
    assert 180 <= len(VOCABULARY) <= 220
    assert all(words(word) == [word] for word in VOCABULARY)
    needed = "under yellow sun night sky watercolour pixel left above four meadow sunset an outlined"
    assert set(needed.split()) <= set(VOCABULARY)


def test_one_object_captions_tell_the_truth_and_say_what_they_told():
    for scene, text, told in captioned(1, 1500):
        (thing,) = scene.objects
        assert found(KIND_OF, text) == [thing.kind], text
        colours = [thing.colour] * ("colour" in told) + [scene.background] * ("background" in told)
        assert sorted(found(COLOUR_OF, text)) == sorted(colours), text
        if "colour" in told:
            assert re.search(rf"{thing.colour.replace('purple', '(purple|violet)')} [a-z ]+", text), text
        assert found(SIZE_OF, text) == [thing.size] * ("size" in told), text
        places = ["".join(groups) for groups in re.findall(PLACES, text)]
        assert [PLACE_OF.get(p, p) for p in places] == [thing.position] * ("position" in told), text
        assert told <= set(FACTS) | {"style"} and "kind" in told


def test_object_and_background_colours_are_not_swapped():
    for scene, text, told in captioned(2, 500):
        if {"colour", "background"} <= told:
            (thing,) = scene.objects
            nouns = "|".join(form for name in NOUNS[thing.kind] for form in name)
            before_noun = re.search(rf"(\w+) ({nouns})\b", text)
            assert before_noun and COLOUR_OF[before_noun.group(1)] == thing.colour, text


@pytest.mark.parametrize("alike", [False, True], ids=["mixed", "alike"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_captions_of_several_objects_count_right(count, alike):
    for scene, text, told in captioned(3, 100, count=count, alike=alike):
        number, kinds = 1, []
        for meaning in found(NUMBER_OF | KIND_OF, text):
            if isinstance(meaning, str):
                kinds += [meaning] * number
            number = meaning if isinstance(meaning, int) else 1
        assert sorted(kinds) == sorted(thing.kind for thing in scene.objects), text
        assert "count" in told


@pytest.mark.parametrize("related", ["left of", "right of", "above", "below"])
def test_told_relations_are_true(related):
    meaning = {"over": "above", "under": "below", "beneath": "below", "underneath": "below"}
    meaning |= {"above": "above", "below": "below", "left of": "left of", "right of": "right of"}
    inverse = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    tellings = 0
    for scene, text, told in captioned(4, 150, count=2, related=related):
        first, second = scene.objects
        if first.kind == second.kind or "relation" not in told:
            continue
        tellings += 1
        straight = found(KIND_OF, text) == [first.kind, second.kind]
        assert found(meaning, text) == [related if straight else inverse[related]], text
    assert tellings > 50


def test_same_seed_gives_the_same_captions_and_seeds_differ():
    scene = sample_scene(
        np.random.default_rng(0), kind="fish", colour="red", background="white", size="large"
    )
    runs = [[caption(scene, np.random.default_rng(seed)) for seed in range(200)] for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 80
    forms = {
        "a large red fish on a white background",
        "a red fish",
        "red fish, white background",
        "a picture of a red fish",
        "on a white background there is a large red fish",
        "a white background with a large red fish",
    }
    rng = np.random.default_rng(1)
    assert forms <= {caption(scene, rng) for _ in range(2500)}


def test_labels_name_the_facts():
    for scene, _, _ in captioned(5, 100):
        (thing,) = scene.objects
        labels = scene_labels(scene)
        facts = {
            "kind": thing.kind,
            "colour": thing.colour,
            "background": scene.background,
            "size": thing.size,
        }
        assert {fact: FACTS[fact][labels[fact]] for fact in facts} == facts
        assert FACTS["position"][labels["position"]] == thing.position
    labels = scene_labels(sample_scene(np.random.default_rng(0), background="sea", sky="night"))
    assert FACTS["background"][labels["background"]] == "sea"


def test_evaluation_phrasings_are_english_within_the_vocabulary():
    facts = {"size": "large", "colour": "red", "kind": "fish", "background": "white"}
    assert phrase(EVALUATION_PHRASINGS[0], **facts) == "a large red fish on a white background"
    assert phrase(EVALUATION_PHRASINGS[1], **facts | {"colour": "orange"}) == "an orange fish"
    for template in EVALUATION_PHRASINGS:
        for kind in KINDS:
            for colour in COLOURS:
                text = phrase(template, size="small", colour=colour, kind=kind, background="orange")
                assert set(words(text)) <= set(VOCABULARY)
                assert not re.search(r"\ba [aeiou]", text)
