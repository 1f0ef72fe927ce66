"""The tokenizer against transformers' CLIPTokenizer; chunks and weights."""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastldm.errors import CheckpointError, InvalidArgument
from fastldm.models import tokenizer_files
from fastldm.models.tokenizer import Tokenizer, split_weights

transformers = pytest.importorskip("transformers")

PROMPTS = [
    "", " ", "\n", "a photo of a cat", "A PHOTO of a Cat", "  leading,   inner \t and trailing  ",
    "line\nbreak\r\nand more\v\f", "it's we're they've I'm you'll he'd don't o'clock 'quoted' ''",
    "It'S WE'RE I'M", "rock'n'roll 's", "’curly’ it’s", "1girl, 2boys 1234567890 3.14 1/2 10,000 ½ ² Ⅷ ٣",
    "C++ & C# @home #tag $5 50% a_b a-b a--b a...b !?!? !!! ~~~ ^^ ``", "&lt;b&gt; &#39; &nbsp; &amp;amp;",
    "(masterpiece), [best] {quality} <lora:x> |a| \\ / ((double)) )( (", "<b>bold</b>",
    "naïve café Ångström Øre ß ẞ İstanbul ﬁne ǆ Σίσυφος ΟΔΟΣ", "e\u0301 vs é, A\u030a, ṩ, ḍ̇",
    "日本語のテキスト 中文字符 한국어 한", "नमस्ते दुनिया", "שלום עולם", "مرحبا بالعالم",
    "😀 😃😄 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ❤️ ✨", "emoji😀inside", "\u200bzero\u200cwidth\u200d \ufeffbom \u2060",
    "\u00a0nbsp\u3000wide\u2028sep\u2029x\x85y", "\x00null\x01\x02 \x1b[31m \x7f \x80\x9f",
    "\ufffd \ufffe \U0010ffff \ue000", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 Ｆｕｌｌ ｗｉｄｔｈ ①②", "supercalifragilisticexpialidocious",
    "x" * 500, "ab" * 300, "9" * 200, "!" * 120, "é" * 150, "word," * 80,
    "a " * 74, "a " * 75, "a " * 76, "a " * 200,
    "<|endoftext|>", "a <|endoftext|> b", "<|startoftext|>x<|endoftext|>", "<|ENDOFTEXT|>", "<|StartOfText|>",
    "<|endoftext|", "<|pad|> <unk>", "</w> a</w> Ġ ¡ Ā", "hello! hello!! ! a!b",
    "trending on artstation, 8k uhd, f/1.8, iso 100, 35mm",
]  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary() -> tuple[dict[str, int], list[str]]:
    """CLIP's vocabulary and merges by the recipe of its authors, with nothing of fastldm."""
    lines = gzip.decompress(tokenizer_files.MERGES.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    codes = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    letters = [chr(code) for code in codes]
    letters += [chr(256 + n) for n in range(256 - len(codes))]
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(line.split()) for line in lines]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, lines


def write_folder(folder: Path, vocabulary: dict[str, int], merges: list[str], pad: str, **extra: Any) -> Path:
    """A folder with the files and fields of the real ones: SD1 pads with its end token, SD2 with "!"."""
    folder.mkdir(exist_ok=True)
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    bos, eos = ({"content": token} | flags for token in ("<|startoftext|>", "<|endoftext|>"))
    special = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": eos}
    config = {
        "add_prefix_space": False,
        "bos_token": {"__type": "AddedToken"} | bos,
        "eos_token": {"__type": "AddedToken"} | eos,
        "unk_token": {"__type": "AddedToken"} | eos,
        "do_lower_case": True, "errors": "replace", "model_max_length": 77, "pad_token": pad,
        "tokenizer_class": "CLIPTokenizer",
    }  # fmt: skip
    files = {
        "vocab.json": vocabulary,
        "special_tokens_map.json": special,
        "tokenizer_config.json": config | extra,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer.clip()


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def pair(request: pytest.FixtureRequest, vocabulary: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The shipped tokenizer, the one of a folder, and transformers' of the same folder."""
    pad, pad_id = {"sd1": ("<|endoftext|>", 49407), "sd2": ("!", 0)}[request.param]
    folder = write_folder(tmp_path_factory.mktemp(request.param), *vocabulary, pad)
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    return Tokenizer.clip(pad_id), Tokenizer.from_folder(folder), theirs


def expected(theirs: Any, prompt: str) -> list[tuple[int, ...]]:
    """The chunks of transformers' ids; the first is what diffusers feeds to the text encoder."""
    first = theirs(prompt, padding="max_length", max_length=77, truncation=True).input_ids
    ids = theirs(prompt, add_special_tokens=False).input_ids
    bos, eos, pad = theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id
    parts = [ids[start : start + 75] for start in range(0, max(len(ids), 1), 75)]
    chunks = [(bos, *part, eos, *[pad] * (75 - len(part))) for part in parts]
    assert chunks[0] == tuple(first)
    return chunks


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: ascii(prompt)[1:25])
def test_equals_transformers(pair: Any, prompt: str) -> None:
    shipped, folder, theirs = pair
    want = expected(theirs, prompt)
    assert list(shipped.encode(prompt).chunks) == want
    assert list(folder.encode(prompt).chunks) == want


PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="()\\"), max_size=60)
PROSE = st.lists(
    st.sampled_from(["cat", "Dogs", "it's", " ", ",", "\n", "!", "10k", "é", "😀", "<|endoftext|>"])
).map("".join)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(prompt=PLAIN | PROSE)
def test_equals_transformers_on_any_text(pair: Any, prompt: str) -> None:
    shipped, _, theirs = pair
    assert list(shipped.encode(prompt).chunks) == expected(theirs, prompt)


def test_known_ids(clip: Tokenizer) -> None:
    assert clip.encode("a photo of a cat").chunks[0][:8] == (49406, 320, 1125, 539, 320, 2368, 49407, 49407)
    assert clip.encode("Hello, World").chunks[0][:6] == (49406, 3306, 267, 1002, 49407, 49407)
    assert (clip.bos_id, clip.eos_id, clip.pad_id, clip.unk_id) == (49406, 49407, 49407, None)
    assert (clip.max_length, clip.vocab_size) == (77, 49408)


def test_shipped_vocabulary(clip: Tokenizer, vocabulary: Any) -> None:
    assert clip.backend.get_vocab() == vocabulary[0]
    assert len(vocabulary[0]) == 49408


def test_shipped_merges_are_the_published_ones() -> None:
    digest = hashlib.sha256(tokenizer_files.MERGES.read_bytes()).hexdigest()
    assert digest == tokenizer_files.MERGES_SHA256
    assert digest in (tokenizer_files.MERGES.parent / "SOURCE.md").read_text()
    assert "Permission is hereby granted" in (tokenizer_files.MERGES.parent / "LICENSE").read_text()


@pytest.mark.parametrize("damage", ["missing", "truncated", "changed"])
def test_damaged_merges(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str) -> None:
    content = bytearray(tokenizer_files.MERGES.read_bytes())
    content[1000] ^= damage == "changed"
    copy = tmp_path / "merges.gz"
    if damage != "missing":
        copy.write_bytes(content[:500_000] if damage == "truncated" else content)
    monkeypatch.setattr(tokenizer_files, "MERGES", copy)
    with pytest.raises(CheckpointError, match="reinstall fastldm") as caught:
        Tokenizer.clip()
    assert caught.value.file == str(copy)


@pytest.mark.parametrize(
    ("words", "chunks"), [(0, 1), (1, 1), (75, 1), (76, 2), (150, 2), (151, 3), (1000, 14)]
)
def test_chunks(clip: Tokenizer, words: int, chunks: int) -> None:
    encoded = clip.encode("cat " * words)
    assert len(encoded.chunks) == len(encoded.weights) == chunks
    assert all(len(chunk) == 77 for chunk in encoded.chunks + encoded.weights)
    ids = [index for chunk in encoded.chunks for index in chunk]
    assert ids.count(2368) == words
    assert ids.count(49406) == chunks


def test_another_length(clip: Tokenizer) -> None:
    assert clip.encode("a photo of a cat", 5).chunks == (
        (49406, 320, 1125, 539, 49407),
        (49406, 320, 2368, 49407, 49407),
    )


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a (red:1.3) cat", [("a ", 1), ("red", 1.3), (" cat", 1)]),
        ("(a red (big) cat:1.2)", [("a red (big) cat", 1.2)]),
        ("(a [b] {c}:0.5)", [("a [b] {c}", 0.5)]),
        ("((a:1.5) b:2) c", [("a", 3), (" b", 2), (" c", 1)]),
        ("(((a:2):2):2)", [("a", 8)]),
        ("(a:1.1)(b:1.2)", [("a", 1.1), ("b", 1.2)]),
        ("(16:9:1.5)", [("16:9", 1.5)]),
        ("(a : 1.5 )", [("a ", 1.5)]),
        ("(a:-.5) (b:+2.) (c:1e-1)", [("a", -0.5), (" ", 1), ("b", 2), (" ", 1), ("c", 0.1)]),
        ("(a:0)", [("a", 0)]),
        ("(a (b:2)", [("(a ", 1), ("b", 2)]),
        ("a:2) (b:2)", [("a:2) ", 1), ("b", 2)]),
        (r"\(a:2\)", [("(a:2)", 1)]),
        (r"(cat \(animal\):1.5)", [("cat (animal)", 1.5)]),
        (r"(a\):2) b", [("a)", 2), (" b", 1)]),
        ("((a:1000):1000)", [("a", 1000)]),
    ],
)  # fmt: skip
def test_weights(prompt: str, pieces: list[tuple[str, float]]) -> None:
    got = split_weights(prompt)
    assert [text for text, _ in got] == [text for text, _ in pieces]
    assert [weight for _, weight in got] == pytest.approx([weight for _, weight in pieces])


@pytest.mark.parametrize(
    "prompt",
    ["(cat)", "((cat))", "[cat]", "[cat:1.3]", "{cat:1.2}", "(cat:)", "(cat:x)", "(cat:1.3x)", "(cat:1.2.3)",
     "(cat:nan)", "(cat:inf)", "(cat:1e400)", "(built:1987)", "(:1.3)", "cat:1.3", "(cat:1.3", "cat:1.3)",
     ")(", "(cat:1,3)", "(cat:٣)"],
)  # fmt: skip
def test_everything_else_is_literal(prompt: str) -> None:
    assert split_weights(prompt) == [(prompt, 1.0)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from(["(", ")", ":", "1.3", "a ", ":2)", "\\", "(b:3)", " ", "-", "."]), max_size=30
    ).map("".join)
)
def test_weights_lose_no_word(prompt: str) -> None:
    pieces = split_weights(prompt)
    assert all(-1000 <= weight <= 1000 for _, weight in pieces)
    letters = [letter for letter in prompt if letter in "ab"]
    assert [letter for text, _ in pieces for letter in text if letter in "ab"] == letters


@pytest.mark.parametrize(
    "prompt", ["(cat:1)", "a (red:1.0) cat, (on (a):1) mat", "((a cat:1) x:1)", "(it's:1) 'quoted'"]
)
def test_a_weight_of_one_changes_nothing(clip: Tokenizer, prompt: str) -> None:
    plain = "".join(text for text, _ in split_weights(prompt))
    assert clip.encode(prompt) == clip.encode(plain)


def test_weights_stand_at_their_tokens(clip: Tokenizer) -> None:
    encoded = clip.encode("a " * 74 + "(photo cat:1.5) of")
    assert len(encoded.chunks) == 2
    weight = {
        (i, w)
        for chunk, ws in zip(encoded.chunks, encoded.weights, strict=True)
        for i, w in zip(chunk, ws, strict=True)
    }
    assert weight == {(49406, 1), (320, 1), (1125, 1.5), (49407, 1), (2368, 1.5), (539, 1)}


HOSTILE = {
    "open": "(" * 32000, "nested": "(" * 10000 + "a" + ":1)" * 7000, "groups": "(a:1)" * 6400,
    "digits": "(:" + "1" * 31990, "colons": ":" * 32000, "spaces": "(a:" + " " * 31990,
    "spaced colons": ": " * 16000, "one word": "a" * 32000, "emoji": "😀" * 32000,
    "marks": "e" + "\u0301" * 31999,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_long_prompts_take_linear_time(clip: Tokenizer, name: str) -> None:
    start = time.process_time()
    encoded = clip.encode(HOSTILE[name])
    assert time.process_time() - start < 2  # quadratic: tens of seconds
    assert all(len(chunk) == 77 for chunk in encoded.chunks)


@pytest.mark.parametrize("prompt", [None, 5, b"cat", ["cat"], "\ud800", "a\udfffb"], ids=ascii)
def test_refuses_what_is_no_text(clip: Tokenizer, prompt: Any) -> None:
    with pytest.raises(InvalidArgument, match="^prompt="):
        clip.encode(prompt)


def test_threads(clip: Tokenizer) -> None:
    want = [clip.encode(prompt) for prompt in PROMPTS]
    got: list[Any] = []
    threads = [
        threading.Thread(target=lambda: got.append([clip.encode(p) for p in PROMPTS])) for _ in range(32)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 32
    assert all(answer == want for answer in got)


@pytest.mark.parametrize("pad_id", [49407, 0])
def test_saved_clip_equals_transformers(tmp_path: Path, pad_id: int) -> None:
    ours = Tokenizer.clip(pad_id)
    ours.save(tmp_path)
    theirs, again = transformers.CLIPTokenizer.from_pretrained(tmp_path), Tokenizer.from_folder(tmp_path)
    assert (again.special, again.max_length) == (ours.special, 77)
    for prompt in PROMPTS:
        assert (
            list(ours.encode(prompt).chunks) == list(again.encode(prompt).chunks) == expected(theirs, prompt)
        )


@pytest.mark.parametrize("legacy", [True, False], ids=["added_tokens.json", "added_tokens_decoder"])
def test_added_tokens_equal_transformers(tmp_path: Path, vocabulary: Any, legacy: bool) -> None:
    """Textual inversion adds tokens after CLIP's."""
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    end = {"content": "<|endoftext|>", "special": True} | plain
    added = {"49407": end, "49408": {"content": "<my-Cat>", "special": False} | plain}
    folder = write_folder(
        tmp_path, *vocabulary, "<|endoftext|>", **({} if legacy else {"added_tokens_decoder": added})
    )
    if legacy:
        (folder / "added_tokens.json").write_text(json.dumps({"<my-Cat>": 49408}))
    theirs, ours = transformers.CLIPTokenizer.from_pretrained(folder), Tokenizer.from_folder(folder)
    assert ours.vocab_size == 49409
    for prompt in ["a photo of <my-Cat>", "<my-Cat><my-Cat> <my-cat>", "x<my-Cat>y <|endoftext|>"]:
        assert list(ours.encode(prompt).chunks) == expected(theirs, prompt)
    assert 49408 in ours.encode("a <my-Cat>").chunks[0]
