"""Prompts to embeddings: against diffusers' encode_prompt; chunks, weights, threads."""

from __future__ import annotations

import threading

import pytest
import torch

from fastldm.errors import InvalidArgument
from fastldm.models.clip import CLIPTextConfig, CLIPTextModel
from fastldm.models.text import TextConditioner, TextEmbeddings, weigh
from fastldm.models.tokenizer import Tokenizer

TINY = CLIPTextConfig(49408, 32, 64, 2, 4, 77)
LONG = "a very long prompt about a cat, " * 12  # 96 tokens: two chunks


def model(config: CLIPTextConfig = TINY) -> CLIPTextModel:
    torch.manual_seed(11)
    made = CLIPTextModel(config).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.fixture(scope="module")
def clip() -> TextConditioner:
    return TextConditioner(Tokenizer.clip(), model())


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal bit for bit."""
    return got.dtype == want.dtype and torch.equal(got, want)


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def with_diffusers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Our conditioner, and diffusers' pipeline on the same tokenizer and weights."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    tokenizer, ours = Tokenizer.clip({"sd1": 49407, "sd2": 0}[request.param]), model()
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer.save(folder)
    encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TINY.to_dict())).eval()
    names = encoder.state_dict()
    encoder.load_state_dict(
        {k if k in names else k.removeprefix("text_model."): v for k, v in ours.state_dict().items()}
    )
    parts = dict.fromkeys(("vae", "unet", "scheduler", "safety_checker", "feature_extractor"))
    pipeline = diffusers.StableDiffusionPipeline(
        **parts,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder),
        text_encoder=encoder,
        requires_safety_checker=False,
    )
    return TextConditioner(tokenizer, ours), pipeline


@pytest.mark.parametrize(
    ("prompts", "negatives"),
    [
        (["a photo of a cat"], None),
        ([""], None),
        (["a photo of a cat"], [""]),
        (["a red fish!", "an (old) house, [snow]", "A CAT\n"], ["blurry, ugly", "", "text!!"]),
        (["it's <|endoftext|> over"], ["😀 naïve café"]),
        (["a " * 75], ["b " * 75]),
    ],
)
def test_equals_diffusers(with_diffusers: tuple, prompts: list[str], negatives: list[str] | None) -> None:
    ours, pipeline = with_diffusers
    got = ours.encode(prompts, negatives)
    with torch.no_grad():
        positive, negative = pipeline.encode_prompt(prompts, "cpu", 1, negatives is not None, negatives)
    want = positive if negatives is None else torch.cat([negative, positive])
    assert got.context.shape == want.shape
    assert float((got.context - want).abs().max()) <= 1e-5 * float(want.abs().max())
    assert (got.lengths, got.warnings) == (None, ())


def test_more_than_diffusers_can_read(with_diffusers: tuple) -> None:
    """Of a long prompt diffusers reads the first 75 tokens; they are our first chunk."""
    ours, pipeline = with_diffusers
    got = ours.encode([LONG], [""])
    with torch.no_grad():
        positive, negative = pipeline.encode_prompt([LONG], "cpu", 1, True, [""])
    assert got.context.shape == (2, 154, 32)
    torch.testing.assert_close(got.context[:, :77], torch.cat([negative, positive]), rtol=0, atol=1e-5)


def test_long_prompts_are_chunks_side_by_side(clip: TextConditioner) -> None:
    words = "cat " * 75
    got = clip.encode([words + "dog"]).context
    assert same(got, torch.cat([clip.encode([words]).context, clip.encode(["dog"]).context], dim=1))


@pytest.mark.parametrize(("prompt", "negative"), [(LONG, "blurry"), ("a cat", LONG)])
def test_both_halves_get_as_many_chunks(clip: TextConditioner, prompt: str, negative: str) -> None:
    got = clip.encode([prompt], [negative])
    empty, short = clip.encode([""]).context, clip.encode([min(prompt, negative, key=len)]).context
    assert got.context.shape == (2, 154, 32)
    assert got.lengths is None
    shorter = 1 if prompt == "a cat" else 0
    assert same(got.context[shorter], torch.cat([short, empty], dim=1)[0])


def test_lengths_keep_pairs_apart(clip: TextConditioner) -> None:
    """What a pair means does not depend on the other pairs: the filling behind the shorter is marked."""
    got = clip.encode(["a cat", LONG, "a dog"], ["", "", LONG * 2])
    assert got.context.shape == (6, 231, 32)
    assert got.lengths is not None
    assert got.lengths.tolist() == [77, 154, 231] * 2
    for i, (prompt, negative) in enumerate([("a cat", ""), (LONG, ""), ("a dog", LONG * 2)]):
        alone = clip.encode([prompt], [negative])
        assert alone.lengths is None
        for row, want in zip((i, i + 3), alone.context, strict=True):
            assert same(got.context[row, : got.lengths[row]], want)
    filling = clip.encode([""]).context[0]
    assert same(got.context[3], torch.cat([clip.encode(["a cat"]).context[0], filling, filling]))


def test_repeated_prompts_are_encoded_once(clip: TextConditioner) -> None:
    calls = []
    with_count = TextConditioner(clip.tokenizer, clip.text_encoder)
    handle = clip.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    got = with_count.encode(["a cat"] * 4, [""] * 4).context
    handle.remove()
    assert len(calls) == 2
    assert same(got, clip.encode(["a cat"], [""]).context.repeat_interleave(4, dim=0))


def test_weight_of_one_is_no_weight(clip: TextConditioner) -> None:
    assert same(clip.encode(["a (red:1) (big (cat):1.0)"]).context, clip.encode(["a red big (cat)"]).context)


def test_weights(clip: TextConditioner) -> None:
    plain, got = clip.encode(["a red cat"]).context[0], clip.encode(["a (red:1.5) cat"]).context[0]
    shift = got[1] - plain[1]
    factor = torch.ones(77, 1)
    factor[2] = 1.5
    torch.testing.assert_close(got, plain * factor + shift[0])
    assert float(got.mean()) == pytest.approx(float(plain.mean()), abs=1e-6)
    assert float((got - plain)[2].abs().max()) > 0.1


def test_weights_count_within_their_chunk_only(clip: TextConditioner) -> None:
    plain, got = clip.encode([LONG + " fish"]).context, clip.encode([LONG + " (fish:2)"]).context
    assert same(got[:, :77], plain[:, :77])
    assert not same(got[:, 77:], plain[:, 77:])


def test_extreme_weights_stay_finite(clip: TextConditioner) -> None:
    for weight in ["0", "-1000", "1000", "1e-300"]:
        assert clip.encode([f"(a cat:{weight})"]).context.isfinite().all()


def test_weights_where_the_mean_is_zero() -> None:
    """The ratio of the means would be anything here; the shift is not."""
    embedding = torch.tensor([[1.0, -1.0], [2.0, -2.0]])
    assert weigh(embedding, (1.0, 1.5)).tolist() == [[1, -1], [3, -3]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision(dtype: torch.dtype) -> None:
    embedding, weights = torch.randn(8, 4), (1.0, 1.3, 0.7) + (1.0,) * 5
    got, want = weigh(embedding.to(dtype), weights), weigh(embedding.to(dtype).float(), weights)
    assert same(got, want.to(dtype))


def test_unknown_words_are_told() -> None:
    tokenizer = Tokenizer.from_words(["a", "red", "fish"], 8)
    words = TextConditioner(tokenizer, model(CLIPTextConfig(7, 32, 64, 1, 4, 8)))
    got = words.encode(["a blue fish", "a (Green:1.2) fish, blue"], ["ugly", ""])
    assert got.warnings == ("unknown words: ugly, blue, Green",)
    assert got.context.shape == (4, 8, 32)
    assert words.encode(["a red fish"]).warnings == ()


def test_encoder_with_fewer_positions_than_the_tokenizer_says() -> None:
    short = TextConditioner(Tokenizer.clip(), model(CLIPTextConfig(49408, 32, 64, 1, 4, 16)))
    assert short.encode(["cat " * 15]).context.shape == (1, 32, 32)


def test_refuses() -> None:
    with pytest.raises(InvalidArgument, match="tokenizer='49408 tokens': allowed is at most the 100 tokens"):
        TextConditioner(Tokenizer.clip(), model(CLIPTextConfig(100, 32, 64, 1, 4, 77)))


def test_refuses_lists_of_different_length(clip: TextConditioner) -> None:
    with pytest.raises(InvalidArgument, match="negative_prompt"):
        clip.encode(["a", "b"], ["c"])


def test_needs_no_gradient(clip: TextConditioner) -> None:
    assert not clip.encode(["a cat"]).context.requires_grad
    assert all(parameter.grad is None for parameter in clip.text_encoder.parameters())


def test_threads(clip: TextConditioner) -> None:
    """32 threads on one conditioner: bit for bit what one thread gets."""
    jobs = [
        ([f"cat number {i}", LONG if i % 5 == 0 else f"(dog {i}:1.{i})"], ["", f"not {i}"]) for i in range(32)
    ]
    want = [clip.encode(*job) for job in jobs]
    got: dict[int, TextEmbeddings] = {}
    start = threading.Barrier(32)

    def work(i: int) -> None:
        start.wait()
        got[i] = clip.encode(*jobs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(got[i].context, want[i].context) for i in range(32))
