import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo.batching import collate_answers
from dpo.cli import main
from dpo.decoding import choose_tokens, decode
from dpo.errors import InputError
from dpo.generate import GenerateOptions, TextStream, encode_prompts, generate
from dpo.log_probs import completion_log_probs
from dpo.models import Decoder, init_model, load_model, parse_config, save_model
from dpo.pair import PreferencePair, Text
from dpo.tokenization import tokenize_pairs
from dpo.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6], [7], [2, 7, 1, 8, 2])
WINDOWS: dict[str, dict[str, object]] = {
    "mistral": {"sliding_window": 3},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
}
MESSAGES: tuple[dict[str, str], ...] = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are you?"},
)
BOS_TOKENIZER = byte_tokenizer(("<s>", "</s>"), bos="<s>", eos="</s>", chat_template=None)
TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "bytes with begin": BOS_TOKENIZER,
    "bpe": train_bpe(["the tree that they see there", "été 🌍 hello, hello world"], 290),
}


def never(prompts: Sequence[Sequence[int]]) -> list[frozenset[int]]:
    return [frozenset()] * len(prompts)


def greedy(model: Decoder, steps: int) -> list[Any]:
    options = GenerateOptions(max_new_tokens=steps)
    uniforms = torch.zeros(len(PROMPTS), steps)
    return decode(model, PROMPTS, options, stop_ids=never(PROMPTS), uniforms=uniforms)


def full_logits(model: Decoder, ids: Sequence[int]) -> Tensor:
    """(N, V) logits of a whole text, nothing cached."""
    array = np.array(ids, np.int32)
    texts = collate_answers([(array[:1], [array[1:]])], multiple_of=1)
    with torch.no_grad():
        hidden: Tensor = model(texts.stream)
    return hidden @ model.output_head().weight.T


@pytest.fixture(params=["llama", *WINDOWS])
def model(request: pytest.FixtureRequest, make_model: Callable[..., Decoder]) -> Decoder:
    """A Llama, and models with windows; ``test_models.py`` decodes with every architecture."""
    changes = WINDOWS.get(request.param, {})
    return make_model(model_type=request.param, dtype=torch.float64, **changes)


# --- decoding with the cache --------------------------------------------------------------------


def test_greedy_tokens_are_those_of_the_full_recomputation(model: Decoder) -> None:
    for prompt, text in zip(PROMPTS, greedy(model, 12), strict=True):
        logits = full_logits(model, [*prompt, *text.ids])
        assert text.ids == logits[len(prompt) - 1 : -1].argmax(dim=1).tolist()


def test_log_probs_are_those_of_scoring(model: Decoder) -> None:
    texts = greedy(model, 12)
    trees = [
        (np.array(prompt, np.int32), [np.array(text.ids, np.int32)])
        for prompt, text in zip(PROMPTS, texts, strict=True)
    ]
    expected = completion_log_probs(model, collate_answers(trees)).log_probs
    actual = [log_prob for text in texts for log_prob in text.log_probs]
    assert actual == pytest.approx(expected.tolist(), rel=0, abs=1e-10)


def test_texts_that_end_early_leave_the_others_as_they_are(model: Decoder) -> None:
    alone = greedy(model, 12)
    stops = [frozenset({text.ids[3]}) for text in alone[:2]] + [frozenset()]
    options = GenerateOptions(max_new_tokens=12)
    texts = decode(model, PROMPTS, options, stop_ids=stops, uniforms=torch.zeros(3, 12))
    for text, whole in zip(texts[:2], alone[:2], strict=True):
        assert text.is_finished
        assert text.ids == whole.ids[: whole.ids.index(whole.ids[3]) + 1]
        assert len(text.log_probs) == len(text.ids)
    assert not texts[2].is_finished
    assert texts[2].ids == alone[2].ids


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_greedy_texts_equal_those_of_transformers(kind: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=5,
        pad_token_id=0,
        **({"sliding_window": 6} if kind == "Mistral" else {}),
    )
    torch.manual_seed(1)
    peer: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    peer.save_pretrained(tmp_path)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [7], [80, 81, 82], [17, 60, 5, 90]]
    stops = [frozenset({5})] * len(prompts)
    texts = decode(
        load_model(tmp_path),
        prompts,
        GenerateOptions(max_new_tokens=60),
        stop_ids=stops,
        uniforms=torch.zeros(len(prompts), 60),
    )
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([prompt])
        whole = peer.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60
        )
        assert text.ids == whole[0, len(prompt) :].tolist()
    assert len({text.is_finished for text in texts}) == 2  # both ways of ending are compared


# --- drawing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.7, 5, None), (1.5, None, 0.8), (0.9, 8, 0.6), (1.0, 99, 1.0)],
)
def test_tokens_are_drawn_with_the_chances_that_transformers_gives_them(
    temperature: float, top_k: int | None, top_p: float | None
) -> None:
    log_probs = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    warpers: list[Any] = [transformers.TemperatureLogitsWarper(temperature)]
    warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [transformers.TopPLogitsWarper(top_p)] if top_p else []
    expected = log_probs
    for warper in warpers:
        expected = warper(torch.zeros(3, 1, dtype=torch.int64), expected)
    options = GenerateOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    draws = 500
    counts = torch.zeros(3, 20)
    for draw in range(draws):  # the middle of each share of [0, 1): nothing is left to chance
        uniforms = torch.full((3,), (draw + 0.5) / draws, dtype=torch.float64)
        tokens = choose_tokens(log_probs, options, uniforms)
        counts[torch.arange(3), tokens] += 1
    assert (counts / draws - expected.softmax(dim=1)).abs().max() < 1.5 / draws


def test_draws_by_hand() -> None:
    """The tokens have the shares [0, 0.5), [0.5, 0.8) and [0.8, 1), of top_p 0.7 the first two."""
    log_probs = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    whole, nucleus = (GenerateOptions(temperature=1.0, top_p=top_p) for top_p in (None, 0.7))

    def drawn(options: GenerateOptions, uniform: float) -> list[int]:
        return choose_tokens(log_probs, options, torch.tensor([uniform]).double()).tolist()

    assert [drawn(whole, uniform) for uniform in (0.0, 0.49, 0.51, 0.79, 0.81)] == [
        [0], [0], [1], [1], [2],
    ]  # fmt: skip
    assert [drawn(nucleus, uniform) for uniform in (0.0, 0.62, 0.63, 0.999)] == [
        [0], [0], [1], [1],
    ]  # fmt: skip


def test_the_last_draw_there_is_stays_among_the_tokens_that_can_be_drawn() -> None:
    log_probs = torch.tensor([[0.7, 0.2, 0.1]]).log()
    options = GenerateOptions(temperature=1.0, top_p=0.8)
    almost_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert choose_tokens(log_probs, options, almost_one).tolist() == [1]


@pytest.fixture
def chatty(make_model: Callable[..., Decoder]) -> Decoder:
    return make_model(vocab_size=290)


def test_one_token_to_draw_from_is_the_likeliest(chatty: Decoder) -> None:
    prompts = ["one", "two", "three"]
    drawn = GenerateOptions(max_new_tokens=9, temperature=3.0, top_k=1)
    expected = generate(chatty, byte_tokenizer(), prompts, GenerateOptions(max_new_tokens=9))
    assert generate(chatty, byte_tokenizer(), prompts, drawn) == expected


def test_draws_depend_on_the_seed_and_not_on_the_batches(chatty: Decoder) -> None:
    prompts = ["a", "bcd", "efghijk", "lm"]

    tokenizer = byte_tokenizer()
    tokenizer.eos_ids = frozenset(range(0, 290, 5))  # texts end at different times

    def texts(seed: int, tokens_per_batch: int) -> list[tuple[int, ...]]:
        options = GenerateOptions(max_new_tokens=9, temperature=1.0, seed=seed)
        written = generate(chatty, tokenizer, prompts, options, tokens_per_batch=tokens_per_batch)
        return [generation.ids for generation in written]

    assert texts(0, 1) == texts(0, 10_000) == texts(0, 25)
    assert texts(0, 10_000) != texts(1, 10_000)
    assert len(set(map(len, texts(0, 1)))) > 1


# --- texts --------------------------------------------------------------------------------------


def test_a_text_is_what_its_tokens_say_without_the_end(chatty: Decoder) -> None:
    tokenizer = byte_tokenizer()
    first = generate(chatty, tokenizer, ["hello"], GenerateOptions(max_new_tokens=6))[0]
    assert not first.is_finished
    assert first.text == tokenizer.decode(first.ids)
    assert len(first.ids) == len(first.log_probs) == 6
    tokenizer.eos_ids = frozenset({first.ids[4]})
    second = generate(chatty, tokenizer, ["hello"], GenerateOptions(max_new_tokens=6))[0]
    assert second.is_finished
    assert second.ids == first.ids[: first.ids.index(first.ids[4]) + 1]


def test_text_is_given_out_while_it_is_written(chatty: Decoder) -> None:
    said: dict[int, list[str]] = {0: [], 1: []}
    options = GenerateOptions(max_new_tokens=20, temperature=1.0)
    generations = generate(
        chatty,
        byte_tokenizer(),
        ["one", "another"],
        options,
        on_text=lambda index, text: said[index].append(text),
    )
    for index, generation in enumerate(generations):
        assert len(said[index]) > 3
        assert "".join(said[index]) == generation.text


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@settings(max_examples=60)
@given(data=st.data())
def test_pieces_make_up_the_text_of_any_tokens(tokenizer: Tokenizer, data: st.DataObject) -> None:
    text = data.draw(st.text(max_size=8))
    noise = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=8))
    ids = data.draw(st.permutations([tokenizer.encode(text), noise]))
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in (*ids[0], *ids[1])]
    assert not any("\ufffd" in piece[-1:] for piece in pieces)
    whole = tokenizer.decode([*ids[0], *ids[1]], skip_special_tokens=True)
    assert "".join(pieces) + stream.finish() == whole


def test_a_character_of_several_tokens_is_given_out_whole() -> None:
    stream, tokenizer = TextStream(byte_tokenizer()), byte_tokenizer()
    pieces = [stream.add(token) for token in tokenizer.encode("a🌍é")]
    assert pieces == ["a", "", "", "", "🌍", "", "é"]
    assert [stream.add(byte) for byte in "é".encode()[:1]] == [""]
    assert stream.finish() == "\ufffd"


# --- prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@settings(max_examples=60)
@given(
    text=st.text(min_size=1) | st.lists(st.sampled_from(["the", "tree", "é", " "])).map(" ".join)
)
def test_plain_prompts_have_the_tokens_of_training(tokenizer: Tokenizer, text: str) -> None:
    try:
        pair = PreferencePair(text, "yes", "no")
    except InputError:
        return  # nothing but blanks
    assert encode_prompts([text], tokenizer) == [prompt_of_training(pair, tokenizer)]


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("ends_with_answer", [False, True])
def test_conversations_have_the_tokens_of_training(
    tokenizer: Tokenizer, ends_with_answer: bool
) -> None:
    start = {"role": "assistant", "content": "I am"}
    prompt = (*MESSAGES, start) if ends_with_answer else MESSAGES
    me, you = ({"role": "assistant", "content": text} for text in (" me", " you"))
    pair = PreferencePair(prompt, (me,), (you,))
    assert encode_prompts([prompt], tokenizer) == [prompt_of_training(pair, tokenizer)]


def prompt_of_training(pair: PreferencePair, tokenizer: Tokenizer) -> list[int]:
    ids: list[int] = tokenize_pairs([pair], tokenizer).pairs[0].prompt_ids.tolist()
    return ids


def test_begin_token_stands_before_plain_text_once() -> None:
    assert encode_prompts(["ab", "<s>ab"], BOS_TOKENIZER) == [[256, 97, 98]] * 2


def test_the_end_of_a_turn_ends_a_conversation_but_no_plain_text(
    make_model: Callable[..., Decoder],
) -> None:
    """The template ends a turn with <|im_end|>, which is not the tokenizer's end token."""
    tokenizer = byte_tokenizer(("<|im_start|>", "<|im_end|>", "<e>"), eos="<e>")
    (end_of_turn,) = tokenizer.encode("<|im_end|>")
    model = make_model(vocab_size=259, tie_word_embeddings=False)
    with torch.no_grad():  # a model that always writes the end of a turn
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight[end_of_turn] = 1.0
    plain, chat = generate(model, tokenizer, ["hi", MESSAGES], GenerateOptions(max_new_tokens=3))
    assert (chat.ids, chat.text, chat.is_finished) == ((end_of_turn,), "", True)
    assert (plain.ids, plain.is_finished) == ((end_of_turn,) * 3, False)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0 and finite, got 0.0"),
        ({"temperature": float("inf")}, "temperature must be above 0 and finite, got inf"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be at least 1, got 0"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"temperature": 1.0, "top_p": 1.1}, r"top_p must be in \(0, 1\], got 1.1"),
        ({"temperature": 1.0, "seed": -1}, r"seed must be in \[0, 2\^63\), got -1"),
        ({"top_k": 5}, "top_k is for drawing tokens: give a temperature"),
        ({"top_p": 0.5}, "top_p is for drawing tokens: give a temperature"),
        ({"seed": 0}, "seed is for drawing tokens: give a temperature"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GenerateOptions(**options)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", r"prompts\[1\] has no tokens: there is nothing to continue"),
        ((), r"prompts\[1\] has no messages: there is nothing to continue"),
        ("x" * 120, r"prompts\[1\]: 120 tokens and max_new_tokens 9 are more than the 128 "),
        ("<|im_end|>", r"prompts\[1\]: the tokenizer makes token 257, .* embeddings for 257"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(
    make_model: Callable[..., Decoder], prompt: Text, message: str
) -> None:
    options = GenerateOptions(max_new_tokens=9)
    with pytest.raises(InputError, match=message):
        generate(make_model(vocab_size=257), byte_tokenizer(), ["fine", prompt], options)


def test_nothing_comes_of_no_prompts(chatty: Decoder) -> None:
    assert generate(chatty, byte_tokenizer(), []) == []


# --- dpo generate -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk whose tokens are bytes and which has a chat template."""
    config = {
        "model_type": "llama",
        "vocab_size": 258,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 200,
    }
    folder = tmp_path_factory.mktemp("model")
    model = init_model(parse_config(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(9.0)
    save_model(model, folder)
    byte_tokenizer().save(folder)
    return folder


def run(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, ["generate", *map(str, arguments)], input=stdin)


def expected(folder: Path, prompt: Text, **options: Any) -> str:
    (generation,) = generate(
        load_model(folder), load_tokenizer(folder), [prompt], GenerateOptions(**options)
    )
    return generation.text + "\n"


def test_command_answers_a_message(folder: Path) -> None:
    result = run(folder, "--prompt", "Hi", "--max-new-tokens", 20)
    assert result.exit_code == 0, result.output
    message = {"role": "user", "content": "Hi"}
    assert result.stdout == expected(folder, (message,), max_new_tokens=20)
    assert "20 tokens, " in result.stderr
    assert "tokens/s, cut off by --max-new-tokens" in result.stderr


def test_command_continues_a_text_from_stdin(folder: Path) -> None:
    options = ("--raw", "--max-new-tokens", 9, "--temperature", 0.8, "--top-k", 40)
    result = run(folder, *options, "--top-p", 0.9, "--seed", 3, "--quiet", stdin="été\n".encode())
    assert result.exit_code == 0, result.output
    assert result.stdout == expected(
        folder, "été", max_new_tokens=9, temperature=0.8, top_k=40, top_p=0.9, seed=3
    )
    assert result.stderr == ""


def test_command_writes_plain_text_with_a_model_that_has_no_template(
    folder: Path, tmp_path: Path
) -> None:
    for path in folder.iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    result = run(tmp_path, "--prompt", "Hi", "--max-new-tokens", 9)
    assert result.stdout == expected(tmp_path, "Hi", max_new_tokens=9)


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (("--prompt", ""), None, "the prompt is empty: there is nothing to continue"),
        ((), b"", "the prompt is empty: there is nothing to continue"),
        ((), b"\xff", "stdin: not UTF-8"),
        (("--prompt", "Hi", "--top-k", 3), None, "top_k is for drawing tokens"),
        (("--prompt", "Hi", "--max-new-tokens", 200), None, "are more than the 200 that the model"),
        (("--prompt", "Hi", "--revision", "x"), None, "revision 'x' has no meaning"),
    ],
)
def test_command_refuses_what_it_cannot_do(
    folder: Path, arguments: tuple[object, ...], stdin: bytes | None, message: str
) -> None:
    result = run(folder, *arguments, stdin=stdin)
    assert result.exit_code == 2
    assert message in result.stderr


def test_command_refuses_a_folder_that_is_no_model(tmp_path: Path) -> None:
    result = run(tmp_path, "--prompt", "Hi")
    assert result.exit_code == 2
    assert str(tmp_path) in result.stderr


def test_command_asks_for_a_prompt_at_a_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    with pytest.raises(
        click.ClickException, match="no prompt: give --prompt TEXT, or pipe a text in"
    ):
        main(["generate", str(folder)], standalone_mode=False)
