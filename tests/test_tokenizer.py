import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.errors import InputError
from dpo.templates import CHATML
from dpo.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

SPECIALS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
CORPUS = ("the cat sat on the mat.\n\nthe dog isn't here: 1234 é", "a cat that sat\tthere") * 20
TEXTS = st.text(
    st.sampled_from("ab catthe\n\n\t.:'é中123 ") | st.characters(codec="utf-8"), max_size=40
)
PIECES = st.lists(TEXTS | st.sampled_from(SPECIALS), max_size=6).map("".join)

BYTES = byte_tokenizer(SPECIALS, bos="<s>", eos="</s>")
BPE = train_bpe(CORPUS, 320, SPECIALS, bos="<s>", eos="</s>")


def sentencepiece_like() -> Tokenizer:
    """A tokenizer that puts a space before every text, as those of Llama 2 do."""
    vocabulary = {"<s>": 0, "</s>": 1, "▁": 2, "a": 3, "b": 4, "▁a": 5, "ab": 6, "\n": 7}
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": id_, "content": token, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for token, id_ in [("<s>", 0), ("</s>", 1)]
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [["▁", "a"], ["a", "b"]],
            "unk_token": None,
        },
    }
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    files = {"tokenizer.json": json.dumps(content), "tokenizer_config.json": json.dumps(config)}
    return Tokenizer({name: text.encode() for name, text in files.items()}, name="sp")


class TestEncoding:
    @given(text=PIECES)
    @settings(deadline=None)
    def test_ids_stand_for_the_text(self, text: str) -> None:
        for tokenizer in (BYTES, BPE):
            assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_id_of_a_byte_is_the_byte(self) -> None:
        assert BYTES.encode("aé\0 ") == [*"aé\0 ".encode()]

    def test_special_tokens_are_taken_for_what_they_say(self) -> None:
        assert BYTES.encode("a<|im_end|>") == [97, 259]
        assert BYTES.has_special("a<|im_end|>")
        assert not BYTES.has_special("a<|im_end|")
        assert BYTES.decode([97, 259], skip_special_tokens=True) == "a"

    def test_nothing_is_put_around_a_text(self) -> None:
        assert BYTES.starts_with_bos
        assert BYTES.encode("a") == [97]

    @given(text=PIECES, answer=PIECES)
    @settings(deadline=None)
    def test_text_can_be_cut_where_it_is_said(self, text: str, answer: str) -> None:
        cut = BPE.last_cut(text)
        whole = BPE.encode(text + answer)
        assert BPE.encode((text + answer)[:cut]) + BPE.encode((text + answer)[cut:]) == whole

    def test_cut_is_between_the_last_two_words(self) -> None:
        assert BPE.last_cut("the cat sat.\n\nA: ") == len("the cat")
        assert BPE.last_cut("a" * 5000 + " b" + "." * 1000) == 5000
        assert BPE.last_cut("nothing") == 0

    def test_there_is_no_cut_if_tokens_reach_across_words(self) -> None:
        across = train_bpe(CORPUS, 300, (*SPECIALS, "the cat"), eos="</s>")
        assert across.last_cut("on the mat the cat") == 0

    def test_there_is_no_cut_if_a_space_comes_before_every_text(self) -> None:
        assert sentencepiece_like().last_cut("b a") == 0

    @given(text=TEXTS)
    @settings(deadline=None)
    def test_text_after_another_is_encoded_as_by_itself(self, text: str) -> None:
        assert BYTES.encode_after(text) == BYTES.encode(text)
        assert BPE.encode_after(text) == BPE.encode(text)

    def test_text_after_another_has_no_space_before_it(self) -> None:
        tokenizer = sentencepiece_like()
        assert tokenizer.encode("ab") == [5, 4]
        assert tokenizer.encode_after("ab") == [6]


class TestMaking:
    def test_bpe_learns_what_is_frequent(self) -> None:
        assert len(BPE.encode("the cat sat")) < 6
        assert BPE.vocab_size <= 320

    def test_same_texts_make_the_same_tokenizer(self) -> None:
        assert (
            train_bpe(CORPUS, 320, SPECIALS, bos="<s>", eos="</s>").fingerprint == BPE.fingerprint
        )

    def test_vocabulary_has_room_for_bytes_and_special_tokens(self) -> None:
        with pytest.raises(InputError, match="vocab_size must be at least 260, got 259"):
            train_bpe(CORPUS, 259, SPECIALS)

    def test_end_token_is_among_the_special_tokens(self) -> None:
        with pytest.raises(InputError, match="eos_token '<end>' is not in the vocabulary"):
            byte_tokenizer(("<|im_end|>",), eos="<end>")

    def test_pad_is_the_end_token_unless_given(self) -> None:
        assert (BYTES.bos_id, BYTES.eos_id, BYTES.pad_id) == (256, 257, 257)
        assert byte_tokenizer(SPECIALS, pad="<s>").pad_id == 256


class TestFiles:
    @pytest.mark.parametrize("made", [BYTES, BPE], ids=["bytes", "bpe"])
    def test_saved_tokenizer_is_loaded_the_same(self, made: Tokenizer, tmp_path: Path) -> None:
        made.save(tmp_path)
        loaded = load_tokenizer(tmp_path)
        assert loaded.fingerprint == made.fingerprint
        assert loaded.encode("the cat</s>") == made.encode("the cat</s>")
        assert loaded.chat_template == CHATML

    @pytest.mark.parametrize("made", [BYTES, BPE], ids=["bytes", "bpe"])
    def test_transformers_loads_it_with_the_same_ids(self, made: Tokenizer, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        made.save(tmp_path)
        oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in ("the cat", " a\n\n<|im_start|>user\nhé</s>", "<s>x 12  \t"):
            assert oracle(text)["input_ids"] == [made.bos_id, *made.encode(text)]
            assert oracle(text, add_special_tokens=False)["input_ids"] == made.encode(text)
        named = (oracle.bos_token_id, oracle.eos_token_id, oracle.pad_token_id, len(oracle))
        assert named == (made.bos_id, made.eos_id, made.pad_id, made.vocab_size)

    def test_same_files_are_written_that_were_read(self, tmp_path: Path) -> None:
        BPE.save(tmp_path / "a")
        (tmp_path / "a/tokenizer.model").write_bytes(b"\xff sentencepiece")  # nothing reads it here
        load_tokenizer(tmp_path / "a").save(tmp_path / "b")
        names = {path.name for path in (tmp_path / "b").iterdir()}
        own = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
        assert names == {*own, "tokenizer.model"}
        for name in names:
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    def test_stops_are_those_of_the_model_too(self, tmp_path: Path) -> None:
        folder = write_tokenizer(tmp_path, generation_config={"eos_token_id": [257, 259]})
        assert load_tokenizer(folder).eos_ids == {257, 259}
        folder = write_tokenizer(tmp_path, generation_config={}, model_config={"eos_token_id": 258})
        assert load_tokenizer(folder).eos_ids == {257, 258}

    def test_end_token_may_be_named_by_the_model_alone(self, tmp_path: Path) -> None:
        folder = write_tokenizer(tmp_path, config={}, generation_config={"eos_token_id": [259]})
        loaded = load_tokenizer(folder)
        assert (loaded.eos_id, loaded.pad_id, loaded.bos_id) == (259, None, None)
        assert not loaded.starts_with_bos

    def test_older_map_names_tokens_that_the_config_does_not(self, tmp_path: Path) -> None:
        write_tokenizer(tmp_path, config={"bos_token": None, "eos_token": {"content": "</s>"}})
        names = {"bos_token": "<s>", "eos_token": "<s>", "pad_token": {"content": "<s>"}}
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
        loaded = load_tokenizer(tmp_path)
        assert loaded.special_tokens == {"eos_token": "</s>", "pad_token": "<s>"}

    def test_template_of_its_own_file_goes_before_that_of_the_config(self, tmp_path: Path) -> None:
        write_tokenizer(tmp_path, config={"eos_token": "</s>", "chat_template": "config"})
        assert load_tokenizer(tmp_path).chat_template == CHATML
        (tmp_path / "chat_template.jinja").unlink()
        assert load_tokenizer(tmp_path).chat_template == "config"

    def test_template_may_be_one_of_several(self, tmp_path: Path) -> None:
        templates = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
        write_tokenizer(tmp_path, config={"eos_token": "</s>", "chat_template": templates})
        (tmp_path / "chat_template.jinja").unlink()
        assert load_tokenizer(tmp_path).chat_template == "d"

    def test_tokens_that_only_the_config_adds(self, tmp_path: Path) -> None:
        added = {"260": {"content": "<new>", "special": True}, "256": {"content": "<s>"}}
        config = {"eos_token": "<new>", "added_tokens_decoder": added}
        loaded = load_tokenizer(write_tokenizer(tmp_path, config=config))
        assert loaded.encode("a<new>") == [97, 260]
        assert (loaded.eos_id, loaded.vocab_size) == (260, 261)

    def test_padding_and_truncation_of_the_file_are_not_used(self, tmp_path: Path) -> None:
        write_tokenizer(tmp_path)
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        content["truncation"] = {
            "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0,
        }  # fmt: skip
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        assert load_tokenizer(tmp_path).encode("abc") == [97, 98, 99]

    @pytest.mark.parametrize(
        ("file", "content", "fault"),
        [
            ("tokenizer.json", "{}", "tokenizer.json: not a tokenizer: "),
            ("tokenizer.json", "{", "tokenizer.json: not a tokenizer: "),
            ("tokenizer_config.json", "[]", "tokenizer_config.json: expected a JSON object"),
            ("tokenizer_config.json", '{"eos_token": "<e>"}', "eos_token '<e>' is not in the voc"),
            ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id must be ids, found"),
            (
                "tokenizer_config.json",
                '{"added_tokens_decoder": {"300": {"content": "<new>"}}}',
                "added token '<new>' should have id 300, but the next free one is 260",
            ),
        ],
    )
    def test_damaged_files(self, tmp_path: Path, file: str, content: str, fault: str) -> None:
        write_tokenizer(tmp_path)
        (tmp_path / file).write_text(content)
        with pytest.raises(InputError, match=fault):
            load_tokenizer(tmp_path)

    def test_templates_without_a_default(self, tmp_path: Path) -> None:
        config = {"eos_token": "</s>", "chat_template": [{"name": "rag", "template": "r"}, 3]}
        write_tokenizer(tmp_path, config=config)
        (tmp_path / "chat_template.jinja").unlink()
        with pytest.raises(
            InputError, match="chat_template must be text or a list with a 'default'"
        ):
            load_tokenizer(tmp_path)

    def test_template_that_is_no_text(self, tmp_path: Path) -> None:
        write_tokenizer(tmp_path)
        (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
        with pytest.raises(InputError, match=r"chat_template\.jinja: not UTF-8"):
            load_tokenizer(tmp_path)

    def test_folder_without_a_tokenizer(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"no tokenizer\.json; transformers can write it"):
            load_tokenizer(tmp_path)


def write_tokenizer(
    folder: Path,
    *,
    config: object = None,
    generation_config: object = None,
    model_config: object = None,
) -> Path:
    BYTES.save(folder)
    for name, content in (
        ("tokenizer_config.json", config),
        ("generation_config.json", generation_config),
        ("config.json", model_config),
    ):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder
