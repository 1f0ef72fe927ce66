"""Where a tokenizer comes from: the merges that fastldm ships, or a model's tokenizer folder."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from fastldm.errors import CheckpointError, first_line

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_SPECIAL = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
BERT_SPECIAL = {"bos_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
MAX_LENGTH = 77  # CLIP's, where a folder states none
LARGEST_FILE = 16 << 20
MOST_ENTRIES = 500_000  # of a JSON file, counted by commas and brackets: CLIP's tokenizer.json has 200 000

# What tokenizer.json may do to a text beside Sequence, Replace and Split, all in time linear in its length.
HARMLESS = frozenset(
    """
    BertNormalizer Lowercase NFC NFD NFKC NFKD Nmt Strip StripAccents
    BertPreTokenizer ByteLevel CharDelimiterSplit Digits Metaspace Punctuation UnicodeScripts Whitespace
    WhitespaceSplit BPEDecoder ByteFallback CTC Fuse WordPiece
    """.split()
)
MAX_STEPS = 8  # some double a text
MAX_PATTERN = 10_000  # characters
# Patterns that match no empty text and never go back by more than a character: alternatives of characters and
# classes, of which the first may be missing and the last repeat.
_CHARACTER = r"\\[pP]\{\^?\w+\}|\\[sSdDwWnrt]|\\[^a-zA-Z0-9]"
_ATOM = rf"(?:{_CHARACTER}|\[(?:{_CHARACTER}|[^\\\[\]])+\]|[^\\\[\](){{}}|?*+^$])"
_ALTERNATIVE = rf"(?:{_ATOM}\?)?{_ATOM}+\+?"
_PATTERN = re.compile(rf"{_ALTERNATIVE}(?:\|{_ALTERNATIVE})*")

MERGES = Path(__file__).parents[1] / "assets" / "clip" / "bpe_simple_vocab_16e6.txt.gz"
MERGES_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
MERGE_COUNT = 48894  # the file holds 262 144; CLIP uses the first of them, which end before byte 600 000


class Parts(NamedTuple):
    """A tokenizer taken apart: `special` holds bos_token, eos_token, pad_token and perhaps unk_token."""

    backend: tokenizers.Tokenizer
    special: dict[str, str]
    max_length: int
    vocab_size: int  # one more than the largest token id


def clip_parts(pad_id: int) -> Parts:
    """CLIP's tokenizer from the shipped merges, padding with token `pad_id`."""
    vocabulary, merges = _shipped_vocabulary()
    pad = next(token for token, index in vocabulary.items() if index == pad_id)
    backend = clip_backend(vocabulary, merges)
    backend.add_tokens([AddedToken(token, normalized=True, special=True) for token in (START, END)])
    backend.add_tokens([AddedToken(pad, special=True)])
    return Parts(backend, {**CLIP_SPECIAL, "pad_token": pad}, MAX_LENGTH, len(vocabulary))


def folder_parts(folder: Path) -> Parts:
    """A folder's tokenizer, read as transformers reads it; CheckpointError names the file at fault."""
    config_file = folder / "tokenizer_config.json"
    config = _read_json(config_file) if config_file.exists() else {}
    kind = config.get("tokenizer_class")
    if (folder / "tokenizer.json").exists():
        backend = _json_backend(folder / "tokenizer.json")
    elif kind in (None, "CLIPTokenizer", "CLIPTokenizerFast"):
        backend = _vocabulary_backend(folder / "vocab.json", folder / "merges.txt")
    else:
        raise CheckpointError(config_file, "tokenizer_class", f"is {kind!r}, but there is no tokenizer.json")

    named, numbered = _declared_tokens(folder, config)
    for usual in (CLIP_SPECIAL, BERT_SPECIAL):  # transformers takes them unless told otherwise
        if backend.token_to_id(usual["bos_token"]) is not None:
            named = {name: AddedToken(text, special=True) for name, text in usual.items()} | named
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    declared = [*(numbered[index] for index in sorted(numbered)), *named.values()]
    backend.add_tokens([token for token in declared if token.content not in known])  # the last of a text wins
    for index, token in numbered.items():
        if backend.token_to_id(token.content) != index:
            why = f"cannot be token {index}: that is taken, or follows a gap"
            raise CheckpointError(folder, token.content, why)

    special = {name: token.content for name, token in named.items()}
    unknown = getattr(backend.model, "unk_token", None)
    if unknown is not None and backend.token_to_id(unknown) is not None:
        special.setdefault("unk_token", unknown)
    for name in ("bos_token", "eos_token", "pad_token"):
        if name not in special:
            raise CheckpointError(config_file, name, "is missing")
    vocab_size = 1 + max(backend.get_vocab().values())
    return Parts(backend, special, _max_length(config_file, config.get("model_max_length")), vocab_size)


def clip_backend(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """CLIP's text cleaning, its pattern of words, and byte-pair encoding."""
    model = models.BPE(vocabulary, merges, unk_token=END, end_of_word_suffix="</w>")
    backend = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    split = pre_tokenizers.Split(Regex(words), behavior="removed", invert=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def _shipped_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's 49 408 tokens in order and its merges. (Radford et al. 2021, arXiv:2103.00020)"""
    try:
        packed = MERGES.read_bytes()
    except OSError as error:
        raise CheckpointError(MERGES, None, f"{error.strerror}; reinstall fastldm") from None
    if hashlib.sha256(packed).hexdigest() != MERGES_SHA256:
        raise CheckpointError(MERGES, None, "is damaged (wrong sha256); reinstall fastldm")
    text = zlib.decompressobj(wbits=31).decompress(packed, 600_000).decode("utf-8", "ignore")
    lines = text.split("\n", MERGE_COUNT + 1)[1:-1]
    # The bytes that print come first, as themselves; the others follow, as the characters from 256 on.
    printing = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    characters = [chr(code) for code in (*printing, *range(256, 512 - len(printing)))]
    ending = [character + "</w>" for character in characters]
    tokens = [*characters, *ending, *(line.replace(" ", "") for line in lines), START, END]
    merges = [(first, second) for first, _, second in (line.partition(" ") for line in lines)]
    return {token: index for index, token in enumerate(tokens)}, merges


def _json_backend(file: Path) -> tokenizers.Tokenizer:
    _check_steps(file, _read_json(file))
    content = _read(file)
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
    except BaseException as error:
        if not of_library(error):
            raise
        raise CheckpointError(file, None, f"is not a tokenizer: {first_line(error)}") from None
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None  # leaving out merges at random is for training
    return backend


def of_library(error: BaseException) -> bool:
    """Whether it may be an error of the tokenizers library, which knows no narrower types: Exception, or a
    panic.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _check_steps(file: Path, content: Mapping[str, Any]) -> None:
    """Refuse what may take very long on some text, let it grow without bound, or is not known."""
    for section in ("normalizer", "pre_tokenizer", "decoder"):
        steps = [step for step in (content.get(section),) if step is not None]
        for number, step in enumerate(steps, 1):
            kind = _object(step, file, section).get("type")
            if kind == "Sequence":
                steps += [each for value in step.values() if isinstance(value, list) for each in value]
            elif kind not in HARMLESS and not (kind in ("Replace", "Split") and _is_plain(step)):
                shown = f"{json.dumps(step):.120}"
                raise CheckpointError(file, section, f"is not supported, as it may take for ever: {shown}")
            if number > MAX_STEPS:
                raise CheckpointError(file, section, f"has more than {MAX_STEPS} steps")


def _is_plain(step: Mapping[str, Any]) -> bool:
    """Whether a Replace or Split finds its pattern soon, and puts at most a character in its place."""
    pattern = step.get("pattern")
    if not isinstance(pattern, dict) or len(str(step.get("content", ""))) > 1:
        return False
    if isinstance(text := pattern.get("String"), str):
        return 0 < len(text) <= MAX_PATTERN
    text = pattern.get("Regex")
    return isinstance(text, str) and len(text) <= MAX_PATTERN and _PATTERN.fullmatch(text) is not None


def _vocabulary_backend(vocabulary_file: Path, merges_file: Path) -> tokenizers.Tokenizer:
    vocabulary = _read_json(vocabulary_file)
    ids = {index for index in vocabulary.values() if type(index) is int and 0 <= index < 1 << 24}
    if not ids or len(ids) != len(vocabulary):
        raise CheckpointError(vocabulary_file, None, "does not give each token an integer of its own")
    merges = []
    for number, line in enumerate(_read_text(merges_file).split("\n"), 1):
        first, _, second = line.rstrip("\r").partition(" ")
        if all(token in vocabulary for token in (first, second, first + second)):
            merges.append((first, second))
        elif line and not line.startswith("#version"):
            why = f"{line[:80]!r} does not merge two tokens of {vocabulary_file.name}"
            raise CheckpointError(merges_file, f"line {number}", why)
    try:
        return clip_backend(vocabulary, merges)
    except Exception as error:  # the library raises no narrower type
        raise CheckpointError(vocabulary_file, None, f"is not a vocabulary: {first_line(error)}") from None


def _declared_tokens(
    folder: Path, config: Mapping[str, Any]
) -> tuple[dict[str, AddedToken], dict[int, AddedToken]]:
    """The special tokens by name and the added tokens by number, as the files beside the vocabulary say."""
    file = folder / "tokenizer_config.json"
    given = dict(config)
    numbered: dict[int, AddedToken] = {}
    legacy = "added_tokens_decoder" not in config
    if not legacy:
        for index, value in _object(config["added_tokens_decoder"], file, "added_tokens_decoder").items():
            if not index.isdecimal():
                raise CheckpointError(file, "added_tokens_decoder", f"{index!r} is not a token's number")
            numbered[int(index)] = _added_token(value, file, "added_tokens_decoder")
    elif (folder / "special_tokens_map.json").exists():
        file = folder / "special_tokens_map.json"
        given |= _read_json(file)
    named = {
        name: _added_token(given[name], file, name) for name in CLIP_SPECIAL if given.get(name) is not None
    }
    file = folder / "added_tokens.json"
    if legacy and file.exists():
        special = {token.content for token in named.values()}
        for text, number in _read_json(file).items():
            if type(number) is not int:
                raise CheckpointError(file, text, f"is {number!r}; expected a token's number")
            numbered[number] = AddedToken(text, normalized=text not in special, special=text in special)
    by_text = {token.content: token for token in numbered.values()}
    return {name: by_text.get(token.content, token) for name, token in named.items()}, numbered


def _added_token(value: Any, file: Path, key: str) -> AddedToken:
    """A token from its JSON: a string, or an object with its content and flags."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    fields = _object(value, file, key)
    flags = {"special": True} | {flag: fields[flag] for flag in FLAGS if flag in fields}
    content = fields.get("content")
    if not isinstance(content, str) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise CheckpointError(file, key, f"is {value!r}; expected a token")
    return AddedToken(content, **flags)


def _max_length(file: Path, value: Any) -> int:
    """model_max_length; what is absent or astronomical means that no limit was stated."""
    if value is None or (type(value) in (int, float) and value > 1e6):
        return MAX_LENGTH
    if type(value) is not int or value < 3:
        raise CheckpointError(file, "model_max_length", f"is {value!r}; expected an integer ≥ 3")
    return value


def _object(value: Any, file: Path, key: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(file, key, f"is {value!r}; expected an object")
    return value


def _read(file: Path) -> bytes:
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise CheckpointError(file, None, f"is larger than {LARGEST_FILE >> 20} MiB")
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(file, None, error.strerror or "cannot be read") from None


def _read_text(file: Path) -> str:
    try:
        return _read(file).decode()
    except UnicodeDecodeError:
        raise CheckpointError(file, None, "is not UTF-8 text") from None


def _read_json(file: Path) -> dict[str, Any]:
    text = _read_text(file)
    if sum(map(text.count, ",[{")) > MOST_ENTRIES:
        raise CheckpointError(file, None, f"has more than {MOST_ENTRIES} entries")
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(file, None, f"is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(file, None, "is not a JSON object")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name appears twice")
    return found
