"""Model folders, data sets, configs and templates of strangers: refused in time, and never run."""

import gzip
import json
import os
import pickle
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from dpo import preferences
from dpo.checkpoint import latest_checkpoint, save_checkpoint
from dpo.cli import main
from dpo.errors import InputError
from dpo.files import read_json, verify_manifest, write_manifest
from dpo.models import load_model
from dpo.preferences import load_pairs
from dpo.settings import Setting, read_settings, resolve
from dpo.templates import ChatTemplate
from dpo.tokenizer import load_tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]
NESTED = "[" * 100_000
MANY_DIGITS = "9" * 5000


@pytest.fixture
def folder(tmp_path: Path, make_model_folder: Callable[..., Path]) -> Path:
    """A model of its own, to be made hostile."""
    return make_model_folder(tmp_path / "hostile")


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- templates ----------------------------------------------------------------------------------

BOMBS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{% set n = 9 %}{{ n ** (n ** n) }}",
    "round": "{{ 42 | round(-1000000000) }}",
}


def render(source: str) -> str:
    return ChatTemplate(source, name="mine", variables={}).render(MESSAGES)


def test_template_that_takes_too_long_is_ended_and_not_begun_again() -> None:
    template = ChatTemplate(BOMBS["loops"], name="mine", variables={})
    with pytest.raises(InputError, match=r"^mine: takes more than 1 s to render"):
        template.render(MESSAGES)
    begun = time.process_time() + sum(os.times()[2:4])  # with that of processes that have ended
    with pytest.raises(InputError, match=r"^mine: takes more than 1 s to render"):
        template.render(MESSAGES)
    assert time.process_time() + sum(os.times()[2:4]) - begun < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS)
def test_work_in_one_step_of_the_interpreter_is_ended_too(bomb: str) -> None:
    with pytest.raises(InputError, match=r"^mine: .*takes more than 1 s to render"):
        render(BOMBS[bomb])


def test_nested_template_is_refused_when_it_is_compiled() -> None:
    with pytest.raises(InputError, match=r"^mine: not a valid template: maximum recursion depth"):
        render("{{ " + "(" * 100_000)


@pytest.mark.parametrize(
    "source",
    [
        "{% set n = 10000000000 %}{{ 'a' * n }}",
        pytest.param(
            "{% set ns = namespace(x='aa') %}"
            "{% for _ in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            marks=pytest.mark.slow,
        ),
        "{{ '%9999999999d' | format(1) }}",
        "{{ 'a' | center(9999999999) }}",
    ],
)
def test_template_that_allocates_is_refused(source: str) -> None:
    with pytest.raises(InputError, match=r"takes more than (512 MiB of memory|1 s to render)"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['sys'] }}",
        "{{ strftime_now.__builtins__ }}",
        "{{ cycler.__init__.__globals__.os.environ }}",
        "{{ '{0.__class__.__base__}'.format(messages) }}",
        "{{ messages | map(attribute='__class__.mro') | list | string | upper }}",
        "{{ (messages | attr('__class__')).mro() }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_template_that_reaches_for_attributes_gets_nothing(source: str) -> None:
    try:
        text = render(source)
    except InputError:
        return
    assert not any(word in text.lower() for word in ("class", "object", "module", "environ"))


@pytest.mark.parametrize("depth", [900, 100_000])
def test_nested_conversation_is_refused_or_written(depth: int) -> None:
    nested: Any = "x"
    for _ in range(depth):
        nested = [nested]
    template = ChatTemplate("{{ messages | length }}", name="mine", variables={})
    message: Any = {"role": "user", "content": nested}
    with suppress(InputError):
        assert template.render([message]) == "1"
    assert template.render(MESSAGES) == "1"


def test_process_of_a_template_has_no_secrets_and_can_write_no_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    template = ChatTemplate("{{ messages }}", name="mine", variables={})
    process = Path(f"/proc/{template._process.pid}")
    template.render(MESSAGES)
    assert b"secret" not in (process / "environ").read_bytes()
    limits = (process / "limits").read_text().splitlines()
    assert next(line for line in limits if line.startswith("Max file size")).split()[3] == "0"


def test_process_of_a_template_is_out_of_reach_of_ctrl_c_and_bounded_whatever_is_ignored() -> None:
    before = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    try:
        template = ChatTemplate("{{ messages }}", name="mine", variables={})
    finally:
        signal.signal(signal.SIGPROF, before)
    process = template._process.pid
    assert os.getpgid(process) == process
    status = Path(f"/proc/{process}/status").read_text()
    (ignored,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigIgn"))
    assert not int(ignored, 16) >> (signal.SIGPROF - 1) & 1


def test_process_of_a_template_ends_with_it() -> None:
    template = ChatTemplate("{{ messages }}", name="mine", variables={})
    process = template._process
    del template
    assert process.poll() is not None


# --- JSON and numbers ---------------------------------------------------------------------------


def use_model(folder: Path) -> None:
    load_model(folder)


def use_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("hello world"))


@pytest.mark.parametrize(
    "content", [NESTED, '{"a":' * 100_000, f'{{"hidden_size": {MANY_DIGITS}}}']
)
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_nested_and_huge_json_of_a_model_is_refused(folder: Path, file: str, content: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(InputError, match=rf"{file}: not (valid JSON|a tokenizer)"):
        use_model(folder) if file == "config.json" else use_tokenizer(folder)


@pytest.mark.parametrize("content", [NESTED, MANY_DIGITS])
def test_nested_and_huge_json_is_refused_wherever_it_is_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=r"a\.json: not valid JSON"):
        read_json(tmp_path / "a.json")
    (tmp_path / "manifest.json").write_text(content)
    assert verify_manifest(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": 10**30},
        {"vocab_size": 2**31},
        {"hidden_size": 2**31 - 1, "intermediate_size": 2**31 - 1},
        {"num_attention_heads": 2**31 - 1, "head_dim": 2**31 - 1},
    ],
)
def test_model_of_absurd_size_is_refused_at_once(folder: Path, changes: dict[str, object]) -> None:
    change_json(folder / "config.json", **changes)
    begun = time.process_time()
    with pytest.raises(InputError, match=r"config\.json"):
        load_model(folder)
    assert time.process_time() - begun < 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = " + NESTED, "not a TOML file: maximum recursion depth"),
        ("a = " + "{b=" * 5000, "not a TOML file: maximum recursion depth"),
        ("a = " + MANY_DIGITS, "not a TOML file: Exceeds the limit"),
        (".".join("a" * 20_000) + " = 1", "not a TOML file: a line has more than 1000 dots"),
        (".".join("a" * 900) + " = 1", r"unknown key 'a\.a\."),
        ("[train]\nlearning_rate = " + "9" * 400, "learning_rate must be above 0 and finite"),
        ("[train]\nlearning_rate = -" + "9" * 400, "learning_rate must be above 0 and finite"),
    ],
)
def test_hostile_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        resolve(read_settings(tmp_path / "a.toml"))


@pytest.mark.parametrize("name", ["pairs.jsonl.gz", "pairs.json.gz", "pairs.jsonl"])
def test_row_that_unpacks_to_gigabytes_is_refused_before_it_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(preferences, "_MOST_BYTES", 2**16)
    content = b"[" + b" " * 2**17
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(InputError, match=r"of more than 65,536 bytes"):
        load_pairs(path)


# --- weights ------------------------------------------------------------------------------------


def tensors(header: Mapping[str, object] | bytes, *, length: int | None = None) -> bytes:
    """A safetensors file with a header of our own."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    return size.to_bytes(8, "little") + text + bytes(64)


def entry(begin: int, end: int, *shape: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        tensors({}, length=2**63),
        tensors({}, length=2**40),
        tensors({"a": entry(0, 8, 2), "b": entry(4, 12, 2)}),
        tensors({"a": entry(0, 2**63, 2**61)}),
        tensors({"a": entry(0, -4, -1)}),
        tensors({"a": entry(0, 4, 2**62, 2**62)}),
        tensors(b'{"a":' * 50_000),
    ],
    ids=["huge header", "long header", "overlap", "huge offset", "negative", "product", "nested"],
)
def test_hostile_header_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors: damaged or cut off"):
        load_model(folder)


@pytest.mark.parametrize(
    "shard",
    ["/etc/passwd", "../hostile/model.safetensors", "..", ".", "", "a\0b", "a" * 5000, ["a"], None],
)
def test_index_that_leads_elsewhere_is_refused(folder: Path, shard: object) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"index\.json: (weight_map names|not a safetensors)"):
        load_model(folder)


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickles_are_never_opened(folder: Path, tmp_path: Path) -> None:
    planted = pickle.dumps(Planted(tmp_path / "ran"))
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt", "a.pkl"):
        (folder / name).write_bytes(planted)
    use_model(folder)
    use_tokenizer(folder)
    (folder / "model.safetensors").write_bytes(planted)
    with pytest.raises(InputError, match="damaged or cut off"):
        load_model(folder)
    assert not (tmp_path / "ran").exists()
    pickle.loads(planted)
    assert (tmp_path / "ran").exists()  # it would have


# --- links --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "generation_config.json", "tokenizer.json"]
)
def test_link_to_a_text_elsewhere_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    """It would be copied into the model that is trained, and published with it."""
    (tmp_path / "secret").write_text("of mine")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=rf"{name} is a link out of its folder, to .*secret"):
        load_tokenizer(folder)


def test_links_within_a_folder_to_weights_and_into_the_hubs_cache_are_followed(
    folder: Path, tmp_path: Path
) -> None:
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for name, place in {
        "model.safetensors": tmp_path / "weights",
        "tokenizer.json": blobs / "0123",
        "tokenizer_config.json": folder / "other.json",
    }.items():
        (folder / name).rename(place)
        (folder / name).symlink_to(place)
    use_model(folder)
    use_tokenizer(folder)


# --- tokenizers ---------------------------------------------------------------------------------

TOKENIZERS: Mapping[str, Mapping[str, object]] = {
    "panics when loaded": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    },
    "panics when used": {
        "normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "aaaa"},
    },
    "fails when used": {
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": {"a": 0},
        },
    },
    "has huge ids": {"model": {"type": "BPE", "vocab": {"a": 2**31}, "merges": []}},
}  # fmt: skip


@pytest.mark.parametrize("fault", TOKENIZERS)
def test_tokenizer_that_crashes_is_refused(folder: Path, fault: str) -> None:
    change_json(folder / "tokenizer.json", **TOKENIZERS[fault])
    with pytest.raises(InputError, match=r"hostile/tokenizer\.json: (not a tokenizer|no ids, or)"):
        use_tokenizer(folder)


# --- code, checkpoints, data --------------------------------------------------------------------


def test_config_file_that_names_code_is_refused_and_nothing_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a.toml").write_text("model='m'\ndata='d'\nout='o'\n[loss]\nname='evil:loss'")
    settings = read_settings(tmp_path / "a.toml")
    with pytest.raises(InputError, match=r"a\.toml: loss\.name names code to run, .* --loss evil:"):
        resolve(settings)
    with pytest.raises(SystemExit, match="it ran"):
        resolve(settings, [Setting("loss.name", "evil:loss", "--loss", is_text=True)])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "state.json").write_text("[]"),
        lambda folder: (folder / "state.json").write_text('{"format": 1, "step": 1, "state": 3}'),
        lambda folder: (folder / "state.json").write_text(NESTED),
        lambda folder: (folder / "model.safetensors").write_bytes(b"no tensors"),
        lambda folder: (folder / "model.safetensors").write_bytes(
            tensors({"__metadata__": {"shared": '{"a": "b"}'}, "c": entry(0, 64, 16)})
        ),
    ],
)
def test_checkpoint_whose_hashes_are_right_and_whose_content_is_not_is_passed_over(
    tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    save_checkpoint(tmp_path, 1, {"model": {"a": torch.ones(2)}}, {})
    spoil(tmp_path / "step-000001")
    write_manifest(tmp_path / "step-000001")
    found = latest_checkpoint(tmp_path)
    assert found.checkpoint is None
    assert len(found.damaged) == 1


def test_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(50) + b"PAR1")
    with pytest.raises(InputError, match=r"a\.parquet: damaged Parquet file"):
        load_pairs(tmp_path / "a.parquet")


HTML = "<script>alert(1)</script><img src=x onerror=alert(1)>"


def test_no_name_or_text_of_a_run_is_markup_in_its_report(
    tmp_path: Path, make_model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = HTML.replace("/", "-")
    model = make_model_folder(tmp_path / f"model {name}")
    rows = [
        {
            "prompt": HTML,
            "chosen": f"{HTML} {n}",
            "rejected": HTML,
            "source": HTML,
            "id": HTML + str(n),
        }
        for n in range(4)
    ]
    data = tmp_path / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("--model", model, "--data", data, "--out", tmp_path / f"run {name}", "--steps", 1)
    options = ("--threads", "1", "--device", "cpu", "--batch-size", "2")
    result = CliRunner().invoke(main, ["train", *map(str, arguments), *options])
    assert result.exit_code == 0, result.output
    report = (tmp_path / f"run {name}" / "report.html").read_text(encoding="utf-8")
    assert "alert(1)" in report
    assert "<script" not in report
    assert "<img" not in report


def test_secrets_of_the_environment_are_in_nothing_that_a_run_leaves(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD"):
        monkeypatch.setenv(name, "very-secret")
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"say {n}", "chosen": " yes", "rejected": " no"} for n in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("--model", model_folder, "--data", data, "--out", tmp_path / "RUN", "--steps", "1")
    result = CliRunner().invoke(main, ["train", *map(str, arguments), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    left = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"very-secret" in content for content in [*left, result.output.encode()])
