"""Tokenizers read from folders: of words, damaged, hostile."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from fastldm.errors import CheckpointError, InvalidArgument
from fastldm.models import tokenizer_files
from fastldm.models.tokenizer import Tokenizer

CONFIG, SPECIAL, VOCABULARY = "tokenizer_config.json", "special_tokens_map.json", "vocab.json"
START, END = "<|startoftext|>", "<|endoftext|>"
SMALL = {"!": 0, "a": 1, "!</w>": 2, "a</w>": 3, "aa</w>": 4, START: 5, END: 6}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder in CLIP's layout with seven tokens."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    special = {"bos_token": START, "eos_token": {"content": END, "normalized": True}, "pad_token": "!"}
    (folder / VOCABULARY).write_text(json.dumps(SMALL))
    (folder / "merges.txt").write_text("#version: 0.2\na a</w>\n")
    (folder / SPECIAL).write_text(json.dumps(special))
    (folder / CONFIG).write_text(json.dumps({"model_max_length": 9, "tokenizer_class": "CLIPTokenizer"}))
    return folder


def test_small(small: Path) -> None:
    tokenizer = Tokenizer.from_folder(small)
    assert tokenizer.encode("aa A!").chunks == ((5, 4, 3, 0, 6, 0, 0, 0, 0),)
    assert tokenizer.vocab_size == 7
    (small / SPECIAL).unlink()
    (small / CONFIG).unlink()
    assert Tokenizer.from_folder(small).encode("aa A!").chunks == ((5, 4, 3, 2) + (6,) * 73,)


@pytest.mark.parametrize("stated", [None, int(1e30), 1e30])
def test_no_stated_length_is_that_of_clip(small: Path, stated: Any) -> None:
    (small / CONFIG).write_text(json.dumps({"model_max_length": stated}))
    assert Tokenizer.from_folder(small).max_length == 77


def test_truncation_padding_and_dropout_of_the_file_are_ignored(small: Path) -> None:
    plain = Tokenizer.from_folder(small)
    content = json.loads(plain.backend.to_str())
    content["truncation"] = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] |= {"pad_id": 5, "pad_type_id": 0, "pad_token": "x"}
    content["model"]["dropout"] = 0.9
    (small / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.from_folder(small).encode("aa aa aa!") == plain.encode("aa aa aa!")
    assert plain.encode("aa aa aa!").chunks == ((5, 4, 4, 4, 0, 6, 0, 0, 0),)


CONTENTS = [
    (VOCABULARY, '{"a": 0, "b'), (VOCABULARY, "[1, 2]"), (VOCABULARY, b"\xff\xfe\x00"),
    (VOCABULARY, "[" * 100_000), (VOCABULARY, ""), (VOCABULARY, "{}"),
    (VOCABULARY, json.dumps(SMALL | {"\ud800": 7})),
    (VOCABULARY, '{"a": ' + "9" * 5000 + "}"), (VOCABULARY, None),
    ("merges.txt", b"\x80\x81"), ("merges.txt", None),
    (CONFIG, "{"), (CONFIG, "null"), (SPECIAL, "[]"),
    ("tokenizer.json", ""), ("tokenizer.json", '{"hello": 1}'), ("tokenizer.json", "[" * 100_000),
]  # fmt: skip


@pytest.mark.parametrize(("file", "content"), CONTENTS, ids=lambda value: ascii(value)[:20])
def test_no_such_file(small: Path, file: str, content: str | bytes | None) -> None:
    if content is None:
        (small / file).unlink()
    else:
        (small / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_folder(small)
    assert (caught.value.file, caught.value.key) == (str(small / file), None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [0, -1, True, "1", 10**30, 1.0, None])
def test_bad_token_number(small: Path, number: Any) -> None:
    (small / VOCABULARY).write_text(json.dumps(SMALL | {"a": number}))
    with pytest.raises(CheckpointError, match="an integer of its own") as caught:
        Tokenizer.from_folder(small)
    assert caught.value.file == str(small / VOCABULARY)


@pytest.mark.parametrize("line", ["a b", "a a a</w>", "a", " a</w>", "a  a</w>"])
def test_bad_merge(small: Path, line: str) -> None:
    (small / "merges.txt").write_text(f"a a</w>\n{line}\n")
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_folder(small)
    assert (caught.value.file, caught.value.key) == (str(small / "merges.txt"), "line 2")


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        (CONFIG, "tokenizer_class", "T5Tokenizer"),
        (CONFIG, "model_max_length", 0), (CONFIG, "model_max_length", "77"),
        (CONFIG, "model_max_length", float("nan")), (CONFIG, "model_max_length", True),
        (SPECIAL, "pad_token", 0), (SPECIAL, "bos_token", {"lstrip": True}), (SPECIAL, "bos_token", ["x"]),
        (SPECIAL, "eos_token", {"content": "x", "special": 1}),
        (CONFIG, "added_tokens_decoder", [1]), (CONFIG, "added_tokens_decoder", {"x": END}),
        (CONFIG, "added_tokens_decoder", {"7": None}),
        ("added_tokens.json", "x", "7"), ("added_tokens.json", "x", None),
    ],
)  # fmt: skip
def test_bad_field(small: Path, file: str, key: str, value: Any) -> None:
    given = json.loads((small / file).read_text()) if (small / file).exists() else {}
    (small / file).write_text(json.dumps(given | {key: value}))
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_folder(small)
    assert (caught.value.file, caught.value.key) == (str(small / file), key)


@pytest.mark.parametrize("number", [2, 70])
def test_added_token_whose_number_is_taken_or_out_of_reach(small: Path, number: int) -> None:
    (small / "added_tokens.json").write_text(json.dumps({"<x>": number}))
    with pytest.raises(CheckpointError, match=f"cannot be token {number}") as caught:
        Tokenizer.from_folder(small)
    assert caught.value.key == "<x>"


@pytest.fixture
def words(tmp_path: Path) -> Path:
    Tokenizer.from_words(["a", "red", "fish", "on", "background", ",", "."], 12).save(tmp_path)
    return tmp_path


def test_words(words: Path) -> None:
    tokenizer = Tokenizer.from_folder(words)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert (tokenizer.max_length, tokenizer.vocab_size) == (12, 11)
    encoded = tokenizer.encode("A (RED:1.5) Fisch, on a Dog! Fisch.")
    assert encoded.chunks == ((1, 4, 5, 3, 9, 7, 4, 3, 3, 10, 2, 0),)
    assert encoded.weights == ((1, 1, 1.5, 1, 1, 1, 1, 1, 1, 1, 1, 1),)
    assert encoded.unknown == ("Fisch", "Dog")
    assert tokenizer.encode("a red fish").unknown == ()


def test_words_equal_transformers(words: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(words)
    ours = Tokenizer.from_folder(words)
    for prompt in ["a red fish", "A blue FISH, on a\nbackground.", "", "red-fish (fish) <pad> <eos>!"]:
        want = theirs(prompt, padding="max_length", max_length=12, truncation=True).input_ids
        assert ours.encode(prompt).chunks == (tuple(want),)


def test_words_without_declared_ends(words: Path) -> None:
    (words / CONFIG).unlink()
    with pytest.raises(CheckpointError, match="bos_token: is missing"):
        Tokenizer.from_folder(words)


def test_oversized_file(monkeypatch: pytest.MonkeyPatch, words: Path) -> None:
    monkeypatch.setattr(tokenizer_files, "LARGEST_FILE", 100)
    with pytest.raises(CheckpointError, match="larger than"):
        Tokenizer.from_folder(words)


def regex(kind: str, pattern: str, **more: Any) -> dict[str, Any]:
    """A Split or Replace as tokenizer.json holds it."""
    if kind == "Split":
        more = {"behavior": "Isolated", "invert": False}
    return {"type": kind, "pattern": {"Regex": pattern}, **more}


GROWS = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
STEPS = {
    "charsmap": ("normalizer", {"type": "Precompiled", "precompiled_charsmap": ""}),
    "growing": ("normalizer", {"type": "Sequence", "normalizers": [GROWS] * 7}),
    "growing everywhere": ("normalizer", regex("Replace", "x*", content="y")),
    "doubling": ("normalizer", {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 30}),
    "nested": ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [regex("Split", "(a+)+b")]}),
    "backtracking": ("pre_tokenizer", regex("Split", "(?:a|a|b)*(?=[cd])[^a]")),
    "many optional": ("pre_tokenizer", regex("Split", "a?" * 30 + "a" * 30)),
    "recursive": ("pre_tokenizer", regex("Split", r"a\g<0>")),
    "empty": ("pre_tokenizer", regex("Split", "")),
    "repeated": ("decoder", regex("Replace", "a{99999}", content="")),
    "unknown": ("normalizer", {"type": "Magic"}),
    "no object": ("normalizer", ["NFC"]),
}


@pytest.mark.parametrize("case", STEPS)
def test_steps_that_may_take_for_ever_are_refused(words: Path, case: str) -> None:
    section, step = STEPS[case]
    file = words / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), section: step}))
    started = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_folder(words)
    assert (caught.value.file, caught.value.key) == (str(file), section)
    assert time.process_time() - started < 1


PLAIN = [
    r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",  # of the published CLIP
    r"<\|startoftext\|>| ?\p{L}+| ?\p{N}+|\s+",
    r"[\p{L}\p{M}\p{N}]+|,|\.|\-|\[|é|…",
    r"\d",
]


@pytest.mark.parametrize("pattern", PLAIN)
def test_plain_patterns_are_read(words: Path, pattern: str) -> None:
    file = words / "tokenizer.json"
    changed = {"pre_tokenizer": regex("Split", pattern), "normalizer": regex("Replace", r"\s+", content=" ")}
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    assert Tokenizer.from_folder(words).encode("a").chunks[0][1] == 4


def test_patterns_of_our_own_are_read(tmp_path: Path) -> None:
    marks = [chr(code) for code in range(33, 0x3000) if not chr(code).isalnum() and chr(code).isprintable()]
    assert len(marks) > 3000
    Tokenizer.from_words(marks, 12).save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).encode("(\u266b-").chunks[0].count(3) == 0  # none unknown


def test_a_panic_of_the_library_is_an_invalid_argument(words: Path) -> None:
    tokenizer = Tokenizer.from_folder(words)
    pattern = tokenizers.Regex(STEPS["backtracking"][1]["pattern"]["Regex"])
    tokenizer.backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")
    with pytest.raises(InvalidArgument, match="prompt"):
        tokenizer.encode("a" * 22 + " d")


def test_a_word_without_a_token_is_an_invalid_argument(words: Path) -> None:
    file = words / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["unk_token"] = "<none>"
    file.write_text(json.dumps(content))
    with pytest.raises(InvalidArgument, match="prompt='zebra'"):
        Tokenizer.from_folder(words).encode("zebra")


@pytest.mark.parametrize("name", [VOCABULARY, SPECIAL, CONFIG, "tokenizer.json"])
def test_many_entries_and_names_that_appear_twice(small: Path, name: str) -> None:
    for content, why in (('{"a": [' + "0, " * 600_000 + "0]}", "entries"), ('{"a": 1, "a": 1}', "twice")):
        (small / name).write_text(content)
        with pytest.raises(CheckpointError, match=why) as caught:
            Tokenizer.from_folder(small)
        assert caught.value.file == str(small / name)


def test_mutated_files_are_refused_or_usable(words: Path) -> None:
    """Random damage to tokenizer.json: a typed error, or a tokenizer that encodes."""
    generator = random.Random(5)
    original = (words / "tokenizer.json").read_bytes()
    refused = 0
    for _ in range(400):
        damaged = bytearray(original)
        for _ in range(generator.randint(1, 4)):
            place = generator.randrange(len(damaged))
            dropped = generator.randint(0, 3)
            damaged[place : place + dropped] = generator.choice(
                [b"", b"0", b"-1", b'"', b"{", b"\xff", b"null"]
            )
        (words / "tokenizer.json").write_bytes(damaged)
        try:
            Tokenizer.from_folder(words).encode("a red fish")
        except CheckpointError:
            refused += 1
    assert 200 < refused < 400


@pytest.mark.parametrize("told", [True, False])
def test_a_folder_of_bert_equals_transformers(tmp_path: Path, told: bool) -> None:
    """As that of bert-base-uncased, which latent diffusion's text models read with."""
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "##s", "red", "##der", ",", "cafe"]
    theirs = transformers.BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})
    theirs.save_pretrained(tmp_path)
    if not told:  # as in the oldest folders
        (tmp_path / CONFIG).write_text(json.dumps({"do_lower_case": True}))
        (tmp_path / SPECIAL).unlink(missing_ok=True)
    ours = Tokenizer.from_folder(tmp_path)
    for text in ("A redder cat", "cats, zebras", "Caf\u00e9", ""):
        want = theirs(text, padding="max_length", max_length=12)["input_ids"]
        assert list(ours.encode(text, 12).chunks[0]) == want, text
    assert ours.encode("a zebra").unknown == ("zebra",)
