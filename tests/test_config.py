import re
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.config import LossConfig, ReferenceCacheConfig, RunConfig
from dpo.errors import InputError
from dpo.settings import Setting, known_options, parse_assignment, read_settings, resolve
from dpo.train_config import TrainConfig

REQUIRED = {"model": "M", "data": "pairs.jsonl", "out": "RUN"}


def flags(**values: object) -> list[Setting]:
    """Settings as flags make them; a double underscore stands for the dot."""
    return [
        Setting(key.replace("__", "."), value, "--flag", is_text=isinstance(value, str))
        for key, value in {**REQUIRED, **values}.items()
    ]


def written(folder: Path, text: str) -> list[Setting]:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return read_settings(path)


# --- layers -------------------------------------------------------------------------------------


def test_flag_overrides_set_overrides_file_overrides_default(tmp_path: Path) -> None:
    file = written(tmp_path, "[train]\nbatch_size = 1\nkeep = 3\nseed = 7\n")
    sets = [parse_assignment("train.batch_size=2"), parse_assignment("train.keep=4")]
    resolved = resolve(file, sets, flags(train__batch_size="5"))
    train = resolved.config.train
    assert (train.batch_size, train.keep, train.seed, train.log_every) == (5, 4, 7, 1)
    assert resolved.origins["train.batch_size"] == "--flag"
    assert resolved.origins["train.keep"] == "--set train.keep"
    assert resolved.origins["train.seed"] == str(tmp_path / "run.toml")
    assert "train.log_every" not in resolved.origins


def test_later_alternative_takes_the_place_of_the_earlier(tmp_path: Path) -> None:
    file = written(tmp_path, "[train]\nepochs = 2\ntokens_per_micro_batch = 64\n")
    resolved = resolve(file, flags(train__steps="5", train__micro_batch_size="4"))
    train = resolved.config.train
    assert (train.steps, train.epochs) == (5, None)
    assert (train.micro_batch_size, train.tokens_per_micro_batch) == (4, None)
    assert resolved.origins["train.epochs"] == "--flag takes its place"


def test_both_alternatives_in_one_layer_are_refused_with_both_names(tmp_path: Path) -> None:
    file = written(tmp_path, "[train]\nepochs = 2\nsteps = 5\n")
    with pytest.raises(InputError, match=r"train.epochs and train.steps: give one.*run.toml"):
        resolve(file, flags())


def test_loss_options_are_resolved_to_their_defaults() -> None:
    config = resolve(flags(loss__name="sigmoid", loss__label_smoothing="0.1")).config
    assert config.loss == LossConfig("sigmoid", {"beta": 0.1, "label_smoothing": 0.1})


def test_print_says_where_each_value_came_from() -> None:
    text = resolve([parse_assignment("train.keep=4")], flags()).to_toml()
    lines = {
        line.split(" = ")[0]: line.rsplit("  # ", 1)[1] for line in text.splitlines() if "=" in line
    }
    assert lines["model"] == "--flag"
    assert lines["keep"] == "--set train.keep"
    assert lines["beta"] == "default"
    assert tomllib.loads(text)["train"]["keep"] == 4


def test_empty_table_sets_nothing(tmp_path: Path) -> None:
    assert resolve(written(tmp_path, "[train]\n"), flags()).config.train == TrainConfig()


def test_columns_are_a_table_in_the_file_and_a_list_on_the_command_line(tmp_path: Path) -> None:
    columns = {"prompt": "question", "chosen": "a.b"}
    file = written(tmp_path, '[columns]\nprompt = "question"\nchosen = "a.b"\n')
    assert resolve(file, flags()).config.columns == columns
    assert resolve(flags(columns="prompt=question,chosen=a.b")).config.columns == columns


def test_data_sets_and_numbers_can_be_lists(tmp_path: Path) -> None:
    file = written(tmp_path, 'data = ["a", "b"]\n[mix]\nweights = [2, 0.5]\n')
    config = resolve(flags(), file).config
    assert (config.sources, config.mix.weights) == (("a", "b"), (2, 0.5))
    assert resolve(file, flags(data=("a", "b"), mix__weights="2,0.5")).config == config
    assert resolve(written(tmp_path, config.to_toml())).config == config
    assert resolve(flags()).config.sources == ("pairs.jsonl",)


def test_rates_are_a_table_in_the_file_and_a_list_on_the_command_line(tmp_path: Path) -> None:
    rates = {r"layers\.0\.": 0.5, "norm": 2}
    file = written(tmp_path, "[train.rates]\n'layers\\.0\\.' = 0.5\nnorm = 2\n")
    assert resolve(file, flags()).config.train.rates == rates
    assert resolve(flags(train__rates=r"layers\.0\.=0.5,norm=2")).config.train.rates == rates


def test_none_switches_an_optional_value_off(tmp_path: Path) -> None:
    file = written(tmp_path, '[train]\nmax_grad_norm = "none"\n')
    assert resolve(file, flags()).config.train.max_grad_norm is None
    assert resolve(flags(train__max_grad_norm="none")).config.train.max_grad_norm is None


def test_text_that_looks_like_a_number_stays_text() -> None:
    assert resolve(flags(out="2024")).config.out == "2024"


def test_integer_is_a_number() -> None:
    rate = resolve(
        [Setting("train.learning_rate", 1, "run.toml")], flags()
    ).config.train.learning_rate
    assert isinstance(rate, float)


# --- round trip ---------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda t: t != "none")
configs = st.builds(
    RunConfig,
    model=texts,
    data=texts | st.lists(texts, min_size=2, max_size=3, unique=True).map(tuple),
    out=texts,
    reference=st.none() | texts,
    eval_split=st.none() | st.floats(0, 1, exclude_min=True, exclude_max=True),
    columns=st.dictionaries(texts, texts, max_size=3),
    loss=st.builds(LossConfig, st.just("sigmoid"), st.just({"beta": 0.3, "label_smoothing": 0.0})),
    reference_cache=st.builds(ReferenceCacheConfig, st.none() | texts),
    train=st.builds(
        TrainConfig,
        micro_batch_size=st.none() | st.integers(1, 64),
        steps=st.none() | st.integers(1, 10**12),
        learning_rate=st.floats(0, 1e300, exclude_min=True),
        compile=st.booleans(),
        max_grad_norm=st.none() | st.floats(1e-3, 10),
        schedule=st.sampled_from(["linear", "cosine", "constant", "wsd"]),
        rates=st.dictionaries(texts.map(re.escape), st.floats(1e-6, 10), max_size=2),
    ),
)


@given(configs)
@settings(max_examples=50, deadline=None)
def test_config_reads_back_from_its_toml(config: RunConfig) -> None:
    document = tomllib.loads(config.to_toml())
    values = [
        Setting(key if table == "" else f"{table}.{key}", value, "run.toml")
        for table, entries in {
            "": {k: v for k, v in document.items() if k == "columns" or not isinstance(v, dict)},
            **{k: v for k, v in document.items() if k != "columns" and isinstance(v, dict)},
        }.items()
        for key, value in entries.items()
    ]
    assert resolve(values).config == config


def test_saved_config_reads_back_as_a_config_file(tmp_path: Path) -> None:
    config = resolve(flags(train__steps="3", eval_split="0.1")).config
    assert resolve(written(tmp_path, config.to_toml())).config == config


def test_every_option_is_documented() -> None:
    keys = {key for key, option in known_options().items() if option.help}
    config = RunConfig(model="M", data="D", out="O")
    assert keys == set(config.flat())


# --- refusals -----------------------------------------------------------------------------------


def refusal(*layers: list[Setting]) -> str:
    with pytest.raises(InputError) as caught:
        resolve(*layers)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[train]\nlearnig_rate = 1.0",
            "unknown key 'train.learnig_rate'; did you mean 'train.learning_rate'?",
        ),
        ("batch_size = 3", "unknown key 'batch_size'; did you mean 'train.batch_size'?"),
        ("beta = 0.1", "unknown key 'beta'; did you mean 'loss.beta'?"),
        ("[optimizer]", "unknown key 'optimizer'"),
        ("train = 3", "train is a table, name a key of it"),
        ("[train]\nbatch_size = 1.5", "train.batch_size must be an integer, got 1.5 (a number)"),
        ("[train]\nbatch_size = true", "train.batch_size must be an integer, got true (a boolean)"),
        ("[train]\ncompile = 1", "train.compile must be true or false, got 1 (an integer)"),
        ("[train]\nlearning_rate = 'x'", "train.learning_rate must be a number, got 'x' (a text)"),
        ("[train]\nsteps = 'x'", "train.steps must be an integer, or none, got 'x' (a text)"),
        (
            "[train]\nschedule = 'lin'",
            "train.schedule must be one of linear, cosine, constant, wsd, got 'lin'",
        ),
        ("model = 3", "model must be a text, got 3 (an integer)"),
        ("model = 'none'\ndata = []", "data must be a text or a list of texts, got [] (a list)"),
        ("data = [1]", "data must be a text or a list of texts, got [1] (a list)"),
        ("out = ['a']", "out must be a text, got ['a'] (a list)"),
        ("mix.weights = 1", "mix.weights must be a list of numbers, or none, got 1 (an integer)"),
        ("mix.weights = ['a']", "mix.weights must be a list of numbers, or none, got ['a'] (a"),
        (
            "[columns]\nprompt = 3",
            "columns must be a table of texts, as in prompt=question, got {'prompt': 3}",
        ),
        (
            "[train.rates]\nnorm = 'x'",
            "train.rates must be a table of numbers, as in lm_head=0.5, got {'norm': 'x'}",
        ),
        ("[loss]\nbeta = true", "loss.beta must be a number or a text, got true (a boolean)"),
    ],
)
def test_config_file_is_refused_by_key_found_and_expected(
    tmp_path: Path, text: str, message: str
) -> None:
    assert f"{tmp_path / 'run.toml'}: {message}" in refusal(written(tmp_path, text))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"train__batch_size": "many"},
            "--flag: train.batch_size must be an integer, got 'many' (a text)",
        ),
        (
            {"train__compile": "maybe"},
            "--flag: train.compile must be true or false, got 'maybe' (a text)",
        ),
        ({"columns": "prompt"}, "--flag: columns must be a table of texts"),
        (
            {"train__batch_size": "0"},
            "train.batch_size must be at least 1, got 0 (train.batch_size: --flag)",
        ),
        (
            {"train__learning_rate": "nan"},
            "train.learning_rate must be above 0 and finite, got nan",
        ),
        ({"train__weight_decay": "-1"}, "train.weight_decay must be at least 0, got -1"),
        ({"train__beta2": "1"}, "train.beta2 must be in [0, 1), got 1.0"),
        (
            {"train__steps": "1", "train__epochs": "1"},
            "train.epochs and train.steps: give one, not both",
        ),
        (
            {"train__micro_batch_size": "1", "train__tokens_per_micro_batch": "1"},
            "train.micro_batch_size and train.tokens_per_micro_batch: give one, not both",
        ),
        (
            {"train__optimizer": "lion", "train__epsilon": "1e-6"},
            "train.epsilon has no meaning for train.optimizer = lion",
        ),
        (
            {"train__optimizer": "adafactor", "train__beta1": "0.8"},
            "train.beta1 has no meaning for train.optimizer = adafactor",
        ),
        (
            {"train__momentum": "0.9"},
            "train.momentum has no meaning for train.optimizer = adamw",
        ),
        ({"train__ema_decay": "1"}, "train.ema_decay must be in (0, 1), got 1.0"),
        (
            {"train__optimizer": "schedule-free"},
            "train.optimizer = schedule-free needs train.schedule = constant, which is linear",
        ),
        (
            {"train__optimizer": "schedule-free", "train__ema_decay": "0.9"},
            "train.ema_decay has no meaning for train.optimizer = schedule-free: it averages",
        ),
        (
            {"train__optimizer": "schedule-free", "train__beta1": "0"},
            "train.beta1 must be above 0 for train.optimizer = schedule-free, got 0.0",
        ),
        (
            {"train__rates": "lm_head"},
            "--flag: train.rates must be a table of numbers, as in lm_head=0.5, got {'lm_head': ''",
        ),
        ({"train__rates": "norm=0"}, "train.rates: norm must be above 0 and finite, got 0.0"),
        (
            {"train__rates": "(=0.5"},
            "train.rates: '(' is no regular expression: missing ), unterminated subpattern",
        ),
        (
            {"train__group_prompts": "true", "train__share_prefix": "false"},
            "train.group_prompts needs train.share_prefix",
        ),
        (
            {"train__decay_share": "0.1"},
            "train.decay_share is for train.schedule = wsd, which is linear",
        ),
        (
            {"train__decay_share": "0", "train__schedule": "wsd"},
            "train.decay_share must be in (0, 1], got 0.0",
        ),
        (
            {"train__reference_sync_share": "0.5"},
            "train.reference_sync_share needs train.reference_sync_every",
        ),
        (
            {"train__reference_sync_every": "1", "train__reference_sync_share": "1.5"},
            "train.reference_sync_share must be in (0, 1], got 1.5",
        ),
        ({"train__early_stopping": "2"}, "train.early_stopping needs train.eval_every"),
        ({"train__keep_best": True}, "train.keep_best needs train.eval_every"),
        (
            {"train__dtype": "fp16-mixed", "train__device": "cpu"},
            "train.dtype = fp16-mixed needs a GPU",
        ),
        ({"train__tf32": True, "train__device": "cpu"}, "train.tf32 needs a GPU, train.device is"),
        (
            {"train__tf32": True, "train__dtype": "bf16-mixed"},
            "train.tf32 is for train.dtype = float32, which is bf16-mixed",
        ),
        (
            {"train__eval_every": "5"},
            "train.eval_every needs held-out pairs: give eval_data or eval_split",
        ),
        ({"eval_data": "E", "eval_split": "0.1"}, "eval_data and eval_split: give one, not both"),
        ({"eval_split": "1"}, "eval_split must be in (0, 1), got 1.0 (eval_split: --flag)"),
        ({"model": ""}, "model must not be empty"),
        ({"model": "\udcff"}, r"--flag: model is not valid UTF-8: '\udcff'"),
        ({"data": ("a", "\udcff")}, r"--flag: data is not valid UTF-8: ('a', '\udcff')"),
        ({"data": ("a", "")}, "data must not be empty"),
        ({"data": ("a", "b", "a")}, "data names a data set twice: a, b, a (data: --flag)"),
        ({"mix__weights": "1,x"}, "--flag: mix.weights must be a list of numbers, or none, got"),
        ({"mix__weights": "1,-1", "data": ("a", "b")}, "mix.weights must be above 0 and finite"),
        (
            {"mix__weights": "1,2,3", "data": ("a", "b")},
            "mix.weights has 3 numbers, but data names 2 data sets",
        ),
        ({"mix__rows": "9"}, "mix.rows is for several data sets, but data names one"),
        (
            {"data_revision": "main", "data": ("a", "b")},
            "data_revision is of one data set, but data names 2",
        ),
        ({"train__seed": "-1"}, "train.seed must be in [0, 2^63), got -1"),
        ({"train__threads": "5000"}, "train.threads must be in [1, 1024], got 5000"),
        ({"reference_revision": "main"}, "reference_revision needs reference, which is not given"),
        ({"eval_data_split": "test"}, "eval_data_split needs eval_data, which is not given"),
        ({"loss__name": "dpoo"}, "unknown loss 'dpoo'"),
        (
            {"loss__name": "hinge", "loss__label_smoothing": "0.1"},
            "the loss hinge has no option 'label_smoothing'",
        ),
        ({"loss__beta": "-1"}, "loss.beta must be a number in (0, inf), got -1.0 (from --flag)"),
        (
            {"loss__name": "simpo", "reference": "R"},
            "reference is given (R), but the loss simpo reads none",
        ),
    ],
)
def test_flag_is_refused_by_name_and_place(values: dict[str, object], message: str) -> None:
    assert message in refusal(flags(**values))


def test_missing_values_are_named_with_the_flag_to_give() -> None:
    assert refusal([]).splitlines() == [
        "model is missing: give --model or set it in the config file",
        "data is missing: give --data or set it in the config file",
        "out is missing: give --out or set it in the config file",
    ]


def test_faults_of_all_layers_are_reported_together(tmp_path: Path) -> None:
    file = written(tmp_path, "optimizer = 1\neval_split = 2.0\n[train]\nkeep = 0\n")
    message = refusal(file, [parse_assignment("train.steps=x")], flags())
    for fault in ("'optimizer'", "eval_split must be", "train.keep must be", "train.steps must be"):
        assert fault in message


def test_file_that_is_not_toml_is_refused_with_the_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run\.toml: not a TOML file: .*line 2"):
        written(tmp_path, "model = 'M'\ndata 3\n")


def test_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"run\.toml: not a TOML file"):
        read_settings(tmp_path / "run.toml")


def test_missing_config_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.toml: cannot read the config file: No such"):
        read_settings(tmp_path / "absent.toml")


def test_assignment_without_equals_sign_is_refused() -> None:
    with pytest.raises(InputError, match="--set steps: expected key=value"):
        parse_assignment("steps")


@pytest.mark.parametrize("name", ["schedule", "dtype", "device", "on_nonfinite"])
def test_unknown_choice_is_refused_in_python(name: str) -> None:
    choice: dict[str, Any] = {name: "other"}
    with pytest.raises(InputError, match=rf"train\.{name} must be one of .*, got 'other'"):
        TrainConfig(**choice)


def test_unknown_handling_of_bad_rows_is_refused_in_python() -> None:
    choice: dict[str, Any] = {**REQUIRED, "on_bad_row": "ignore"}
    with pytest.raises(InputError, match="on_bad_row must be one of error, skip, got 'ignore'"):
        RunConfig(**choice)


def test_token_budget_is_the_default_unless_pairs_are_given() -> None:
    assert TrainConfig().tokens_per_micro_batch == 8192
    assert TrainConfig(micro_batch_size=2).tokens_per_micro_batch is None


def test_wsd_decays_over_a_fifth_unless_a_share_is_given() -> None:
    assert TrainConfig(schedule="wsd").decay_share == 0.2
    assert TrainConfig(schedule="wsd", decay_share=0.1).decay_share == 0.1
    assert TrainConfig().decay_share is None
    assert (TrainConfig().beta2, TrainConfig(optimizer="lion").beta2) == (0.999, 0.99)
    assert TrainConfig(optimizer="adafactor").beta1 is None
    assert (TrainConfig(optimizer="muon").momentum, TrainConfig().momentum) == (0.95, None)


def test_a_resolved_train_config_can_be_replaced_in_part() -> None:
    assert replace(TrainConfig(), seed=3).epochs == 1
    assert {item.name for item in fields(TrainConfig)} >= {"seed", "epochs"}
