"""The closed world of the shipped model: scenes, their pictures, their captions and a reader of pictures."""

from fastldm.scenes.captions import caption, caption_and_facts, phrase, scene_labels
from fastldm.scenes.check import Reading, read_object
from fastldm.scenes.mixture import draw_scene
from fastldm.scenes.palette import (
    COLOURS,
    HELD_OUT_PAIRS,
    HELD_OUT_TRIPLES,
    IMAGE_SIZE,
    KINDS,
    LANDSCAPES,
    PALETTE,
    POSITIONS,
    RELATIONS,
    SIZES,
    SKIES,
    STYLES,
    UNFIT_COLOURS,
)
from fastldm.scenes.prompts import LayoutBox, label_prompt, layout_of, layout_prompt
from fastldm.scenes.render import Rendered, contact_sheet, render
from fastldm.scenes.scene import Scene, SceneObject, is_held_out, relation, sample_scene
from fastldm.scenes.vocabulary import VOCABULARY

__all__ = [
    "COLOURS",
    "HELD_OUT_PAIRS",
    "HELD_OUT_TRIPLES",
    "IMAGE_SIZE",
    "KINDS",
    "LANDSCAPES",
    "PALETTE",
    "POSITIONS",
    "RELATIONS",
    "SIZES",
    "SKIES",
    "STYLES",
    "UNFIT_COLOURS",
    "VOCABULARY",
    "LayoutBox",
    "Reading",
    "Rendered",
    "Scene",
    "SceneObject",
    "caption",
    "caption_and_facts",
    "contact_sheet",
    "draw_scene",
    "is_held_out",
    "label_prompt",
    "layout_of",
    "layout_prompt",
    "phrase",
    "read_object",
    "relation",
    "render",
    "sample_scene",
    "scene_labels",
]
