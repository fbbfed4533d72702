"""A peer's configuration becomes ours, with its defaults; what cannot be translated is told."""

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from dpo.cli import main
from dpo.config import RunConfig
from dpo.convert_config import PEERS, Conversion, convert_config
from dpo.errors import InputError
from dpo.settings import read_settings, resolve

TRL = {"model_name_or_path": "owner/model", "dataset_name": "owner/pairs"}
LLAMA_FACTORY = {"model_name_or_path": "owner/model", "stage": "dpo"}


def convert(
    folder: Path, options: object, peer: str | None = None, processes: int = 1
) -> Conversion:
    path = folder / "peer.yaml"
    path.write_text(yaml.safe_dump(options), encoding="utf-8")
    return convert_config(path, peer, processes=processes)


def loaded(folder: Path, options: object, peer: str | None = None) -> RunConfig:
    """The config that ``dpo train --config`` reads from what was written."""
    (folder / "run.toml").write_text(convert(folder, options, peer).to_toml(), encoding="utf-8")
    return resolve(read_settings(folder / "run.toml")).config


def test_defaults_of_trl_are_written_where_they_differ(tmp_path: Path) -> None:
    config = loaded(tmp_path, TRL)
    assert (config.model, config.data, config.data_split) == ("owner/model", "owner/pairs", "train")
    assert (config.train.batch_size, config.train.epochs, config.train.seed) == (8, 3, 42)
    assert (config.train.dtype, config.train.recompute) == ("bf16-mixed", "layer")
    assert (config.tokenize.max_length, config.tokenize.truncation) == (1024, "keep-start")
    assert (config.loss.name, config.loss.options["beta"]) == ("sigmoid", 0.1)
    assert (config.train.log_every, config.train.save_every) == (10, 500)
    assert config.adapter.kind is None


def test_defaults_of_llama_factory_are_written_where_they_differ(tmp_path: Path) -> None:
    config = loaded(tmp_path, LLAMA_FACTORY)
    assert (config.train.learning_rate, config.train.dtype) == (5e-5, "float32")
    assert (config.adapter.kind, config.adapter.rank, config.adapter.alpha) == ("lora", 8, 16)
    assert config.adapter.targets is None
    assert config.tokenize.max_length == 2048
    assert config.train.recompute == "layer"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"gradient_accumulation_steps": 4}, {"train.batch_size": 32}),
        ({"learning_rate": "5e-7"}, {"train.learning_rate": 5e-7}),  # YAML takes it for a text
        ({"max_steps": 7}, {"train.steps": 7, "train.epochs": None}),
        ({"warmup_steps": 12}, {"train.warmup_steps": 12}),
        ({"report_to": ["wandb", "tensorboard"]}, {"train.track": "wandb,tensorboard"}),
        ({"max_grad_norm": 0}, {"train.max_grad_norm": None}),
        ({"bf16": False}, {"train.dtype": "float32"}),
        ({"dtype": "bfloat16"}, {"train.dtype": "bfloat16"}),
        ({"lr_scheduler_type": "warmup_stable_decay"}, {"train.schedule": "wsd"}),
        ({"optim": "paged_adamw_8bit"}, {"train.optimizer": "adamw8bit"}),
        ({"save_strategy": "no"}, {"train.save_every": None}),
        ({"model_revision": "abc"}, {"revision": "abc"}),
        (
            {"eval_strategy": "steps", "load_best_model_at_end": True},
            {"eval_data": "owner/pairs", "eval_data_split": "test", "train.eval_every": 10,
             "train.keep_best": True},
        ),
        ({"loss_type": "ipo", "beta": 0.3}, {"loss.name": "ipo", "loss.beta": 0.3}),
        ({"loss_type": ["robust"]}, {"loss.name": "robust", "loss.label_smoothing": 0.0}),
        (
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.2]},
            {"loss.name": "sigmoid:0.8,sft:0.2", "loss.beta": 0.1},
        ),
        ({"loss_type": "sigmoid_norm"}, {"loss.name": "sigmoid_norm", "loss.beta": 0.1}),
        ({"loss_type": "discopop"}, {"loss.name": "discopop", "loss.tau": 0.05}),
        ({"use_weighting": True}, {"loss.name": "wpo"}),
        ({"ld_alpha": 0.3}, {"loss.name": "ld_dpo", "loss.alpha": 0.3}),
        (
            {"sync_ref_model": True},
            {"train.reference_sync_every": 512, "train.reference_sync_share": 0.6},
        ),
        (
            {"use_peft": True, "lora_r": 8, "use_dora": True, "lora_target_modules": "all-linear"},
            {"adapter.kind": "dora", "adapter.rank": 8, "adapter.alpha": 32.0,
             "adapter.targets": None},
        ),
        (
            {"use_peft": True, "load_in_4bit": True, "use_bnb_nested_quant": True},
            {"adapter.quantize": "nf4-double", "adapter.targets": "q_proj,v_proj"},
        ),
        ({"use_peft": True, "load_in_8bit": True}, {"adapter.quantize": "int8"}),
        ({"ld_alpha": 0.0}, {"loss.name": "ld_dpo", "loss.alpha": 0.0}),
        ({"optim": "lion_32bit"}, {"train.optimizer": "lion", "train.beta2": 0.999}),
        ({"optim": "lion_32bit", "adam_beta2": 0.98}, {"train.beta2": 0.98}),
        ({"optim": "paged_adamw_32bit"}, {"train.optimizer": "adamw"}),
        ({"tf32": True}, {"train.tf32": False, "train.dtype": "bf16-mixed"}),
        ({"tf32": True, "bf16": False}, {"train.tf32": True, "train.dtype": "float32"}),
        ({"max_length": None}, {"tokenize.max_length": None, "tokenize.truncation": "error"}),
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 12},
            {"train.schedule": "constant", "train.warmup_steps": 0},
        ),
        (
            {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 12},
            {"train.schedule": "constant", "train.warmup_steps": 12},
        ),
    ],
)  # fmt: skip
def test_option_of_trl_becomes_ours(
    tmp_path: Path, options: dict[str, object], expected: dict[str, object]
) -> None:
    flat = loaded(tmp_path, TRL | options).flat()
    assert {key: flat[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"pref_loss": "simpo", "pref_beta": 2.0}, {"loss.name": "simpo", "loss.gamma": 0.5}),
        ({"pref_loss": "orpo"}, {"loss.name": "orpo", "loss.beta": 0.1}),
        ({"pref_ftx": 0.5}, {"loss.name": "rpo", "loss.alpha": 0.5}),
        ({"dpo_label_smoothing": 0.1}, {"loss.name": "sigmoid", "loss.label_smoothing": 0.1}),
        ({"finetuning_type": "full"}, {"adapter.kind": None}),
        ({"lora_target": "q_proj,v_proj"}, {"adapter.targets": "q_proj,v_proj"}),
        ({"quantization_bit": 4}, {"adapter.quantize": "nf4-double"}),
        ({"loraplus_lr_ratio": 16.0}, {"adapter.b_rate_ratio": 16.0}),
        ({"val_size": 0.1, "eval_strategy": "steps", "eval_steps": 50}, {
            "eval_split": 0.1, "train.eval_every": 50,
        }),
        ({"pure_bf16": True}, {"train.dtype": "bfloat16"}),
        ({"ref_model": "owner/ref"}, {"reference": "owner/ref"}),
        ({"disable_gradient_checkpointing": True}, {"train.recompute": None}),
        ({"bf16": True}, {"train.dtype": "bfloat16"}),  # of the frozen base
        ({"bf16": True, "finetuning_type": "full"}, {"train.dtype": "bf16-mixed"}),
        ({"model_revision": "abc"}, {"revision": "abc"}),
        ({"ld_alpha": 0.0}, {"loss.name": "ld_dpo", "loss.alpha": 0.0}),
        ({"pref_bco_weight": 0.25}, {"loss.name": "sigmoid:0.8,bco:0.2", "loss.beta": 0.1}),
        ({"use_muon": True}, {"train.optimizer": "muon"}),
        ({"lr_scheduler_type": "warmup_stable_decay"}, {"train.decay_share": 2 / 3}),
        ({"val_size": 0.1, "eval_strategy": "steps", "eval_steps": 50, "early_stopping_steps": 3}, {
            "train.early_stopping": 3,
        }),
    ],
)  # fmt: skip
def test_option_of_llama_factory_becomes_ours(
    tmp_path: Path, options: dict[str, object], expected: dict[str, object]
) -> None:
    flat = loaded(tmp_path, LLAMA_FACTORY | options).flat()
    assert {key: flat[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"learnig_rate": 1}, "learnig_rate: unknown to this converter"),
        ({"run_name": "mine"}, "run_name: 'mine' is left out: a run is called by its folder"),
        ({"num_train_epochs": 0.5}, "num_train_epochs: 0.5 is no whole number: give train.steps"),
        ({"warmup_ratio": 0.1}, "warmup_ratio: give train.warmup_steps: 0.1 of the steps"),
        ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type: polynomial has no counterpart"),
        ({"disable_dropout": False}, "disable_dropout: nothing is dropped out here"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type: wsd falls linearly"),
        (
            {"lr_scheduler_type": "constant", "warmup_ratio": 0.1},
            "warmup_ratio: is left out: nothing warms up there",
        ),
        (
            {"use_peft": True, "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
            "bnb_4bit_quant_type: fp4: four bits are those of nf4",
        ),
        (
            {"eval_strategy": "steps", "load_best_model_at_end": True,
             "metric_for_best_model": "rewards/accuracies"},
            "metric_for_best_model: rewards/accuracies: the best is that of the lowest loss",
        ),
        ({"use_peft": True}, "lora_target_modules: PEFT's own layers"),
        ({"load_in_4bit": True}, "load_in_4bit: needs an adapter to train: use_peft"),
        ({"label_smoothing": 0.1}, "label_smoothing: TRL 1.16 reads it for robust, exo_pair and"),
        ({"ld_alpha": 0.3, "loss_type": "ipo"}, "ld_alpha: is translated for the sigmoid loss"),
        ({"loss_type": "bco_pair"}, "loss_type: bco measures from the running mean"),
        ({"f_divergence_type": "forward_kl"}, "f_divergence_type: forward_kl: see --loss f_dpo"),
        ({"trust_remote_code": True}, "trust_remote_code: True is left out: no code of a model"),
        ({"dtype": "auto"}, "dtype: 'auto' takes the file's"),
        ({"save_strategy": "epoch"}, "save_strategy: give train.save_every in steps"),
        ({"datasets": [{"path": "a"}, {"path": "b"}]}, "b: give all sets by data = [...]"),
    ],
)  # fmt: skip
def test_what_cannot_be_translated_is_told_with_the_reason(
    tmp_path: Path, options: dict[str, object], note: str
) -> None:
    made = convert(tmp_path, TRL | options)
    assert [each for each in made.notes if each.startswith(note)]
    assert f"# not translated: {note}" in made.to_toml()


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({}, "bf16: is off: there a GPU holds the base in 16 bits"),
        ({"quantization_type": "fp4"}, "quantization_type: fp4: four bits are those of nf4"),
        ({"quantization_method": "hqq"}, "quantization_method: 'hqq' is left out"),
        ({"ld_alpha": 0.5}, "ld_alpha: weighs the policy's tokens alone there"),
        ({"pref_loss": "orpo", "ld_alpha": 0.5}, "ld_alpha: is translated for the sigmoid loss"),
        ({"pref_loss": "simpo", "pref_bco_weight": 1}, "pref_bco_weight: no mixture of bco with"),
        ({"early_stopping_steps": 3}, "early_stopping_steps: give train.early_stopping beside"),
        ({"val_size": 100}, "val_size: 100 rows: give the share as eval_split"),
        ({"disable_shuffling": True}, "disable_shuffling: True is left out: pairs are always"),
        ({"use_galore": True, "finetuning_type": "full"}, "use_galore: True is left out"),
    ],
)
def test_what_llama_factory_does_otherwise_is_told(
    tmp_path: Path, options: dict[str, object], note: str
) -> None:
    notes = convert(tmp_path, LLAMA_FACTORY | options).notes
    assert [each for each in notes if each.startswith(note)]


def test_dropout_that_their_trainers_switch_off_is_no_difference(tmp_path: Path) -> None:
    lora = {"lora_dropout": 0.1, "bf16": True, "moe_aux_loss_coef": 0.01}
    notes = convert(tmp_path, LLAMA_FACTORY | lora).notes
    assert [note.partition(":")[0] for note in notes] == ["cutoff_len"]
    peft = {"use_peft": True, "lora_target_modules": "all-linear"}
    assert convert(tmp_path, TRL | peft).notes == ()


def test_option_that_is_off_needs_no_counterpart(tmp_path: Path) -> None:
    off = {"report_to": "none", "push_to_hub": False, "deepspeed": None, "padding_free": True}
    assert convert(tmp_path, TRL | off).notes == ()


def test_processes_multiply_the_batch(tmp_path: Path) -> None:
    assert convert(tmp_path, TRL, processes=4).resolved.config.train.batch_size == 32


def test_local_data_is_not_evaluated_on_itself(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").touch()
    local = {"dataset_name": str(tmp_path / "pairs.jsonl"), "eval_strategy": "steps"}
    made = convert(tmp_path, TRL | local)
    assert made.resolved.config.eval_data is None
    assert made.notes == ("eval_strategy: give held-out pairs: eval_data or eval_split",)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["a"], r"expected options by name, found list"),
        ({"stage": "sft"}, r"stage is 'sft', expected 'dpo'"),
        (TRL | {"max_steps": "many"}, r"a value is of another kind than expected"),
        (TRL | {"learning_rate": -1}, r"train\.learning_rate must be above 0"),
        (TRL | {"loss_type": "spin"}, r"spin"),
        (TRL | {"loss_type": ["sigmoid", "sft"], "loss_weights": [1]}, r"of another kind"),
    ],
)
def test_configuration_that_is_none_is_refused(tmp_path: Path, options: object, fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        convert(tmp_path, options)


@pytest.mark.parametrize("text", ["a: [", "a: !!python/object:os.system {}", "\x00"])
def test_file_that_is_no_yaml_is_refused_and_runs_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "peer.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"neither YAML nor JSON"):
        convert_config(path)
    with pytest.raises(InputError, match=r"cannot read it"):
        convert_config(tmp_path / "absent.yaml")


def test_names_cannot_write_into_the_toml(tmp_path: Path) -> None:
    made = convert(tmp_path, TRL | {"x\nmodel = 'other'": 1})
    assert "\nmodel = 'other'" not in made.to_toml()


@pytest.mark.parametrize("peer", PEERS)
def test_every_default_is_an_option_that_is_translated(peer: str) -> None:
    assert set(PEERS[peer].defaults) <= set(PEERS[peer].rules)


def test_command_prints_toml_and_tells_the_rest_on_stderr(tmp_path: Path) -> None:
    path = tmp_path / "dpo.json"
    path.write_text(json.dumps(TRL | {"foo": 1}), encoding="utf-8")
    result = CliRunner().invoke(main, ["convert-config", str(path), "--from", "trl"])
    assert result.exit_code == 0
    assert result.stderr == "not translated: foo: unknown to this converter\n"
    (tmp_path / "run.toml").write_text(result.stdout, encoding="utf-8")
    printed = CliRunner().invoke(
        main, ["train", "--config", str(tmp_path / "run.toml"), "--print-config"]
    )
    assert printed.exit_code == 0, printed.output
    assert "owner/pairs" in printed.stdout
