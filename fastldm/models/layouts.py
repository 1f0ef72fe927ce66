"""Layouts as the tokens that latent diffusion's layout model reads. (Jahn et al. 2021, arXiv:2105.06458)"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

from fastldm.errors import InvalidArgument
from fastldm.models.bert import BERTConfig

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


def layout_tokens(objects: Sequence[tuple[int, Box]], encoder: BERTConfig) -> list[int]:
    """The token ids of (class, (left, top, right, bottom)), boxes in shares of the sides.

    A class is its own token, a corner one of the cells of a grid over the picture; three tokens an object,
    the last token of the vocabulary where there is none, and at the end the corners of the picture itself,
    of which a training picture may have been a part. Raises InvalidArgument for more objects, or a class,
    than the encoder has room for.
    """
    most, nothing = (encoder.max_position_embeddings - 2) // 3, encoder.vocab_size - 1
    cells = isqrt(encoder.vocab_size)

    def corners(box: Box) -> list[int]:
        places = [round(share * (cells - 1)) for share in box]
        return [places[1] * cells + places[0], places[3] * cells + places[2]]

    if len(objects) > most:
        raise InvalidArgument("layout", f"{len(objects)} objects", f"at most {most}")
    ids = []
    for number, box in objects:
        if not 0 <= number < nothing:
            raise InvalidArgument("layout", number, f"a class from 0 to {nothing - 1}")
        ids += [number, *corners(box)]
    return ids + [nothing] * (3 * (most - len(objects))) + corners(WHOLE)
