"""Prompts to token ids: CLIP's byte-pair encoding, or any tokenizer.json, on the `tokenizers` library."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors

from fastldm.errors import InvalidArgument, first_line
from fastldm.models.tokenizer_files import FLAGS, Parts, clip_parts, folder_parts, of_library

LARGEST_WEIGHT = 1000.0

# An escaped parenthesis, "(", ":1.3)" or ")". Written so that a failed match costs time linear in its length.
_SYNTAX = re.compile(r"\\[()]|\(|:\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*\)|\)")


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt in chunks of one length, bos … eos pad…; a weight for each token; the words nobody knows."""

    chunks: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    unknown: tuple[str, ...]


def split_weights(prompt: str) -> list[tuple[str, float]]:
    r"""Cut a prompt where weights change: `a (red:1.3) cat` → ("a ", 1), ("red", 1.3), (" cat", 1).

    Only `(text:number)` is syntax; weights of nested groups multiply, up to ±1000. The rest is literal:
    `(text)`, `[text]`, a parenthesis without a partner, `(:2)`, a number beyond ±1000. `\(` and `\)` are
    parentheses that open and close nothing. The edge of a weighted group also ends a word.
    """
    parts: list[str] = []
    opened: list[tuple[int, int]] = []  # of each "(" without a partner yet: index in parts, end in prompt
    weight_from: dict[int, float] = {}  # index of a weighted group's "(" → its weight
    weight_until: set[int] = set()  # indices of the ":1.3)"
    end = 0
    for match in _SYNTAX.finditer(prompt):
        parts.append(prompt[end : match.start()])
        token, end = match[0], match.end()
        if token == "(":
            opened.append((len(parts), end))
        elif token[0] == "\\":
            token = token[1]
        elif opened:
            index, inside = opened.pop()
            weight = float(match[1] or "inf")
            if abs(weight) <= LARGEST_WEIGHT and inside < match.start():
                weight_from[index] = weight
                weight_until.add(len(parts))
        parts.append(token)
    parts.append(prompt[end:])

    pieces: list[tuple[str, float]] = []
    weights = [1.0]
    text: list[str] = []
    for index, part in enumerate(parts):
        if index not in weight_from and index not in weight_until:
            text.append(part)
            continue
        pieces.append(("".join(text), weights[-1]))
        text = []
        if index in weight_from:
            product = weights[-1] * weight_from[index]
            weights.append(max(-LARGEST_WEIGHT, min(LARGEST_WEIGHT, product)))
        else:
            weights.pop()
    pieces.append(("".join(text), weights[-1]))
    return [piece for piece in pieces if piece[0]]


class Tokenizer:
    """Text to chunks of token ids, without state: threads may share one.

    Weights as in `split_weights`. What one chunk cannot hold (75 tokens of CLIP's 77) goes on in the next.
    A special token written out, like "<|endoftext|>", means itself, as in transformers; so does the padding
    token, and in an SD2 prompt every "!" is one.
    """

    def __init__(self, parts: Parts) -> None:
        self.backend, self.special, self.max_length, self.vocab_size = parts
        self.backend.no_truncation()
        self.backend.no_padding()
        numbers = ((name, self.backend.token_to_id(text)) for name, text in self.special.items())
        ids = {name: number for name, number in numbers if number is not None}
        self.bos_id, self.eos_id, self.pad_id = ids["bos_token"], ids["eos_token"], ids["pad_token"]
        # CLIP calls its end token the unknown one as well, and never needs it: every byte has a token.
        self.unk_id = None if ids.get("unk_token") == self.eos_id else ids.get("unk_token")

    @classmethod
    def clip(cls, pad_id: int = 49407) -> Tokenizer:
        """CLIP's own, from the merges that fastldm ships; pad_id 49407 for SD1, 0 ("!") for SD2."""
        return cls(clip_parts(pad_id))

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Read tokenizer.json, else CLIP's vocab.json and merges.txt, and the small files beside them.

        tokenizer_config.json, special_tokens_map.json and added_tokens.json mean what they mean to
        transformers. Raises CheckpointError naming the file, and the key if one is at fault.
        """
        return cls(folder_parts(Path(folder)))

    @classmethod
    def from_words(cls, words: Iterable[str], max_length: int) -> Tokenizer:
        """One token a word: `<pad> <bos> <eos> <unk>`, then `words` in lower case, or punctuation marks.

        Text is lower-cased, then split at whitespace and punctuation; unlisted marks are dropped.
        """
        special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
        vocabulary = {word: index for index, word in enumerate(dict.fromkeys((*special.values(), *words)))}
        backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        marks = [re.escape(word) for word in vocabulary if len(word) == 1 and not word.isalnum()]
        pattern = Regex("|".join([r"[\p{L}\p{M}\p{N}]+", *marks]))
        backend.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
        backend.add_tokens([AddedToken(token, special=True) for token in special.values()])
        ends = [(token, vocabulary[token]) for token in ("<bos>", "<eos>")]
        # Unused here; with it transformers reads the saved tokenizer as meant.
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
        return cls(Parts(backend, special, max_length, len(vocabulary)))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files that `from_folder` reads; transformers and diffusers read them too."""
        folder = Path(folder)
        is_clip = getattr(self.backend.model, "end_of_word_suffix", None) == "</w>"
        if is_clip:
            self.backend.model.save(str(folder))
        else:
            (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        added = {
            str(index): {"content": token.content} | {flag: getattr(token, flag) for flag in FLAGS}
            for index, token in self.backend.get_added_tokens_decoder().items()
        }
        config = {
            "added_tokens_decoder": added,
            **self.special,
            "model_max_length": self.max_length,
            "tokenizer_class": "CLIPTokenizer" if is_clip else "PreTrainedTokenizerFast",
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def encode(self, text: str, max_length: int | None = None) -> TokenizedPrompt:
        """Cut a text into chunks of `max_length` tokens (None: the tokenizer's); no text is one empty chunk.

        Raises InvalidArgument for another type than text, for half of a surrogate pair, and for what a
        model's tokenizer.json has no way to read.
        """
        length = max_length or self.max_length
        if not isinstance(text, str) or not _is_unicode(text):
            raise InvalidArgument("prompt", text, "a string of Unicode characters")
        ids: list[int] = []
        weights: list[float] = []
        unknown: dict[str, None] = {}
        for piece, weight in split_weights(text):
            encoding = self._encode(piece)
            ids += encoding.ids
            weights += [weight] * len(encoding.ids)
            for index, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
                if index == self.unk_id:
                    unknown[piece[start:stop]] = None

        body = length - 2
        chunks = []
        chunk_weights = []
        for start in range(0, max(len(ids), 1), body):
            part = ids[start : start + body]
            padding = body - len(part)
            chunks.append((self.bos_id, *part, self.eos_id, *[self.pad_id] * padding))
            chunk_weights.append((1.0, *weights[start : start + body], *[1.0] * (1 + padding)))
        return TokenizedPrompt(tuple(chunks), tuple(chunk_weights), tuple(unknown))

    def _encode(self, text: str) -> tokenizers.Encoding:
        """A text without weights."""
        try:
            return self.backend.encode(text, add_special_tokens=False)
        except BaseException as error:
            if not of_library(error):
                raise
            allowed = f"a text that the model's tokenizer can read: {first_line(error)}"
            raise InvalidArgument("prompt", text, allowed) from None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
