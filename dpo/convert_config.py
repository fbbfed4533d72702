"""A peer's configuration of a DPO run as ours: ``dpo convert-config``.

What a peer does by default is written too where it is read from its options, so that the run is
that run and not one with our defaults. What cannot be translated is listed with the reason. To add
an option, add it to the table of its peer; to add a peer, a table and an entry of ``PEERS``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dpo.errors import InputError
from dpo.settings import Resolved, Setting, resolve

Given = Mapping[str, Any]  # the peer's options, its defaults beneath

_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
}
_OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_bnb_8bit": "adamw8bit",
    "adamw_8bit": "adamw8bit",
    "adamw_torch_8bit": "adamw8bit",
    "paged_adamw_8bit": "adamw8bit",
    "paged_adamw_32bit": "adamw",
    "adafactor": "adafactor",
    "lion_32bit": "lion",
    "paged_lion_32bit": "lion",
    "schedule_free_adamw": "schedule-free",
}


@dataclass(frozen=True, slots=True)
class To:
    """An option of ours with the same meaning; its values under other names, if they have any."""

    key: str
    values: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Same:
    """Nothing to translate: it is always so here, or decides nothing about the model."""


@dataclass(frozen=True, slots=True)
class Joined:
    """Read together with other options, by the functions of its peer."""


@dataclass(frozen=True, slots=True)
class Cannot:
    """Has no counterpart, unless it is off."""

    why: str


Rule = To | Same | Joined | Cannot

_CUT: Final[Mapping[str, Rule]] = {  # of TRL, for rows over a limit if there is one
    "truncation_mode": To(
        "tokenize.truncation", {"keep_start": "keep-start", "keep_end": "keep-end"}
    )
}

_TRAINING: Final[Mapping[str, Rule]] = {  # of transformers.TrainingArguments, which both build on
    "output_dir": To("out"),
    "learning_rate": To("train.learning_rate"),
    "weight_decay": To("train.weight_decay"),
    "adam_beta1": To("train.beta1"),
    "adam_beta2": Joined(),
    "adam_epsilon": To("train.epsilon"),
    "lr_scheduler_type": To("train.schedule", _SCHEDULES),
    "optim": To("train.optimizer", _OPTIMIZERS),
    "logging_steps": To("train.log_every"),
    "save_total_limit": To("train.keep"),
    "seed": To("train.seed"),
    "tf32": Joined(),
    "torch_compile": To("train.compile"),
    "max_grad_norm": Joined(),
    "per_device_train_batch_size": Joined(),
    "gradient_accumulation_steps": Joined(),
    "num_train_epochs": Joined(),
    "max_steps": Joined(),
    "warmup_steps": Joined(),
    "warmup_ratio": Joined(),
    "bf16": Joined(),
    "fp16": Joined(),
    "eval_strategy": Joined(),
    "eval_steps": Joined(),
    "save_strategy": Joined(),
    "save_steps": Joined(),
    "load_best_model_at_end": Joined(),
    "metric_for_best_model": Joined(),
    "greater_is_better": Same(),
    "per_device_eval_batch_size": Same(),
    "dataloader_num_workers": Same(),
    "remove_unused_columns": Same(),
    "overwrite_output_dir": Same(),
    "logging_first_step": Same(),
    "logging_strategy": Same(),
    "log_level": Same(),
    "disable_tqdm": Same(),
    "ddp_timeout": Same(),
    "ddp_find_unused_parameters": Same(),
    "gradient_checkpointing_kwargs": Same(),
    "use_liger_kernel": Same(),
    "report_to": Joined(),
    "run_name": Cannot("a run is called by its folder, out"),
    "push_to_hub": Cannot("push afterwards: dpo push RUN OWNER/NAME"),
    "hub_model_id": Cannot("push afterwards: dpo push RUN OWNER/NAME"),
    "resume_from_checkpoint": Cannot("checkpoints of a peer are not read"),
    "data_seed": Cannot("one seed decides all: train.seed"),
    "deepspeed": Cannot("under torchrun, train.parallel = shard divides the model"),
    "fsdp": Cannot("under torchrun, train.parallel = shard divides the model"),
    "fsdp_config": Cannot("under torchrun, train.parallel = shard divides the model"),
    "lr_scheduler_kwargs": Cannot("wsd has train.decay_share, the other schedules no options"),
    "optim_args": Cannot("give them as train.beta1 and so on"),
    "optim_target_modules": Cannot("all trained weights have one optimizer: train.optimizer"),
    "neftune_noise_alpha": Cannot("no noise is added to embeddings"),
}
_TRL: Final[Mapping[str, Rule]] = {
    **_TRAINING,
    "model_name_or_path": To("model"),
    "model_revision": To("revision"),
    "dataset_name": Joined(),
    "datasets": Joined(),
    "dataset_train_split": Joined(),
    "dataset_test_split": Joined(),
    "max_length": To("tokenize.max_length"),
    "max_prompt_length": To("tokenize.max_prompt_length"),
    "truncation_mode": Joined(),
    "gradient_checkpointing": To("train.recompute", {"True": "layer", "False": "none"}),
    "router_aux_loss_coef": To("train.router_loss"),
    "dtype": Joined(),
    "torch_dtype": Joined(),
    "loss_type": Joined(),
    "loss_weights": Joined(),
    "beta": Joined(),
    "label_smoothing": Joined(),
    "discopop_tau": Joined(),
    "ld_alpha": Joined(),
    "use_weighting": Joined(),
    "f_divergence_type": Joined(),
    "f_alpha_divergence_coef": Joined(),
    "sync_ref_model": Joined(),
    "ref_model_sync_steps": Joined(),
    "ref_model_mixup_alpha": Joined(),
    "use_peft": Joined(),
    "lora_r": Joined(),
    "lora_alpha": Joined(),
    "lora_dropout": Joined(),
    "disable_dropout": Joined(),
    "lora_target_modules": Joined(),
    "use_rslora": Joined(),
    "use_dora": Joined(),
    "load_in_4bit": Joined(),
    "load_in_8bit": Joined(),
    "use_bnb_nested_quant": Joined(),
    "bnb_4bit_quant_type": Joined(),
    "bnb_4bit_quant_storage": Same(),
    "lora_task_type": Same(),
    "padding_free": Same(),
    "precompute_ref_log_probs": Same(),
    "precompute_ref_batch_size": Same(),
    "pad_token": Same(),
    "ignore_bias_buffers": Same(),
    "dataset_num_proc": Same(),
    "attn_implementation": Same(),
    "pad_to_multiple_of": Same(),
    "dataset_streaming": Same(),
    "activation_offloading": To("train.offload_activations"),
    "trust_remote_code": Cannot("no code of a model is run"),
    "model_init_kwargs": Cannot("give what it says by options of its own"),
    "dataset_config": Cannot("name its files by data_split, as in FOLDER/train"),
    "lora_modules_to_save": Cannot("an adapter is low-rank updates alone"),
    "lora_target_parameters": Cannot("updates are of linear layers: adapter.targets"),
}
_TRL_DEFAULTS: Final[Given] = {  # of TRL 1.16: DPOConfig, ModelConfig, ScriptArguments
    "learning_rate": 1e-6,
    "per_device_train_batch_size": 8,
    "num_train_epochs": 3,
    "logging_steps": 10,
    "gradient_checkpointing": True,
    "bf16": True,
    "max_length": 1024,
    "truncation_mode": "keep_start",
    "loss_type": ["sigmoid"],
    "beta": 0.1,
    "seed": 42,
    "dataset_train_split": "train",
    "dataset_test_split": "test",
    "save_steps": 500,
}
_LLAMA_FACTORY: Final[Mapping[str, Rule]] = {
    **_TRAINING,
    "model_name_or_path": To("model"),
    "model_revision": To("revision"),
    "cutoff_len": To("tokenize.max_length"),
    "ref_model": To("reference"),
    "loraplus_lr_ratio": To("adapter.b_rate_ratio"),
    "adapter_name_or_path": Joined(),
    "stage": Joined(),
    "finetuning_type": Joined(),
    "dataset": Joined(),
    "eval_dataset": Joined(),
    "val_size": Joined(),
    "pref_loss": Joined(),
    "pref_beta": Joined(),
    "pref_ftx": Joined(),
    "pref_bco_weight": Joined(),
    "simpo_gamma": Joined(),
    "dpo_label_smoothing": Joined(),
    "ld_alpha": Joined(),
    "lora_rank": Joined(),
    "lora_alpha": Joined(),
    "lora_dropout": Same(),  # its trainer switches all dropout off
    "lora_target": Joined(),
    "use_rslora": Joined(),
    "use_dora": Joined(),
    "quantization_bit": Joined(),
    "quantization_type": Joined(),
    "double_quantization": Joined(),
    "use_muon": Joined(),
    "early_stopping_steps": Joined(),
    "pure_bf16": Joined(),
    "disable_gradient_checkpointing": Joined(),
    "do_train": Same(),
    "plot_loss": Same(),
    "flash_attn": Same(),
    "enable_liger_kernel": Same(),
    "overwrite_cache": Same(),
    "preprocessing_num_workers": Same(),
    "save_only_model": Same(),
    "dataset_dir": Same(),
    "do_eval": Same(),
    "cache_dir": Same(),
    "streaming": Same(),
    "tokenized_path": Same(),
    "use_fast_tokenizer": Same(),
    "use_unsloth": Same(),
    "use_unsloth_gc": Same(),
    "use_reentrant_gc": Same(),
    "upcast_layernorm": Same(),
    "upcast_lmhead_output": Same(),
    "moe_aux_loss_coef": Same(),  # its DPO step adds no loss of the router
    "freeze_vision_tower": Same(),
    "freeze_multi_modal_projector": Same(),
    "include_effective_tokens_per_second": Same(),
    "template": Cannot("conversations are written by the tokenizer's own chat template"),
    "max_samples": Cannot("cut the file: head -n"),
    "ref_model_adapters": Cannot("give a merged model as reference"),
    "ref_model_quantization_bit": Cannot("the reference is held as the model is"),
    "disable_shuffling": Cannot("pairs are always shuffled, by train.seed"),
    "additional_target": Cannot("an adapter is low-rank updates alone"),
    "pissa_init": Cannot("adapters begin at zero"),
    "create_new_adapter": Cannot("merge the old adapter first: dpo merge"),
    "use_galore": Cannot("see train.optimizer for the optimizers that there are"),
    "use_apollo": Cannot("see train.optimizer for the optimizers that there are"),
    "use_badam": Cannot("see train.optimizer for the optimizers that there are"),
    "use_adam_mini": Cannot("see train.optimizer for the optimizers that there are"),
    "quantization_method": Cannot("the base is quantized as bitsandbytes does: adapter.quantize"),
    "rope_scaling": Cannot("write it into the model's config.json"),
    "shift_attn": Cannot("attention is that of the model"),
    "resize_vocab": Cannot("the tokenizer is taken as it is"),
    "add_tokens": Cannot("the tokenizer is taken as it is"),
    "add_special_tokens": Cannot("the tokenizer is taken as it is"),
    "default_system": Cannot("write it into the rows"),
    "interleave_probs": Cannot("give all sets by data = [...], their shares by mix.weights"),
    "trust_remote_code": Cannot("no code of a model is run"),
    "packing": Cannot("micro-batches are always packed, and never padded"),
    "image_max_pixels": Cannot("models are of text alone"),
    "video_max_pixels": Cannot("models are of text alone"),
}
_LLAMA_FACTORY_DEFAULTS: Final[Given] = {  # of LLaMA-Factory 0.9.5: its hparams
    "learning_rate": 5e-5,
    "per_device_train_batch_size": 8,
    "num_train_epochs": 3,
    "logging_steps": 500,
    "seed": 42,
    "cutoff_len": 2048,
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "pref_loss": "sigmoid",
    "pref_beta": 0.1,
    "save_steps": 500,
}


@dataclass
class _Translation:
    """What has been translated so far.

    Attributes:
        source: what the configuration is called.
        settings: ours.
        notes: what could not be translated, and why.
    """

    source: str
    settings: list[Setting] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def set(self, key: str, value: object, of: str) -> None:
        """Set an option of ours, by an option of the peer."""
        origin = f"{of} of {self.source}"
        self.settings.append(Setting(key, value, origin, is_text=isinstance(value, str)))

    def note(self, of: str, why: str) -> None:
        """Tell that an option of the peer is not translated in full."""
        self.notes.append(f"{of}: {why}")


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer.

    Attributes:
        rules: what becomes of each option.
        defaults: of the options that decide something which ours decide otherwise.
        join: translates the options that are ``Joined``.
        marks: options by which it is known; none of the peer that is meant otherwise.
    """

    rules: Mapping[str, Rule]
    defaults: Given
    join: Callable[[Given, int, _Translation], None]
    marks: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Conversion:
    """A translated configuration; ``notes`` lists what could not be translated, and why."""

    resolved: Resolved
    notes: tuple[str, ...]

    def to_toml(self) -> str:
        """Write the config, each value beside what it comes from, and the notes above it."""
        notes = "".join(f"# not translated: {' '.join(note.split())}\n" for note in self.notes)
        return notes + self.resolved.to_toml()


def convert_config(path: Path, peer: str | None = None, *, processes: int = 1) -> Conversion:
    """Translate the configuration of a peer's run.

    Args:
        path: a YAML or JSON file, as given to ``trl dpo --config`` or ``llamafactory-cli train``.
        peer: a name in ``PEERS``; None: by the options that it has.
        processes: that the peer would train with, by which its batch size is multiplied.

    Raises:
        InputError: the file cannot be read, is of no DPO run, or a value is out of our range.
    """
    document = _read(path)
    if peer is None:
        marked = (name for name, each in PEERS.items() if not each.marks.isdisjoint(document))
        peer = next(marked, "trl")
    table = PEERS[peer]
    given, made = {**table.defaults, **document}, _Translation(path.name)
    for name, value in given.items():
        _translate(name, value, table.rules, made)
    try:
        table.join(given, processes, made)
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: a value is of another kind than expected: {error}") from error
    needed = [Setting(key, key.upper(), "to be filled in") for key in ("model", "data", "out")]
    return Conversion(resolve(needed, made.settings), tuple(made.notes))


def _read(path: Path) -> dict[str, Any]:
    import yaml  # huggingface-hub brings it

    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path}: neither YAML nor JSON: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InputError(f"{path}: expected options by name, found {type(found).__name__}")
    return found


def _translate(name: str, value: object, rules: Mapping[str, Rule], made: _Translation) -> None:
    """Translate an option that stands for itself."""
    match rules.get(name):
        case None:
            made.note(name, "unknown to this converter")
        case To(key, None) if value is not None:
            made.set(key, value, name)
        case To(key, dict() as values) if value is not None:
            if str(value) in values:
                made.set(key, values[str(value)], name)
            else:
                made.note(name, f"{value} has no counterpart; there are {', '.join(values)}")
        case Cannot(why) if value not in (None, False, "", "none", [], {}):
            made.note(name, f"{value!r} is left out: {why}")


# --- what several options say together ----------------------------------------------------------


def _join_training(given: Given, processes: int, made: _Translation) -> None:
    """Translate what both peers have of transformers."""
    size, steps = given["per_device_train_batch_size"], given.get("gradient_accumulation_steps", 1)
    made.set("train.batch_size", int(size) * int(steps) * processes, "per_device_train_batch_size")
    norm = given.get("max_grad_norm")
    if norm is not None:
        made.set("train.max_grad_norm", norm if float(norm) > 0 else "none", "max_grad_norm")
    if int(given.get("max_steps", -1)) > 0:
        made.set("train.steps", int(given["max_steps"]), "max_steps")
    elif float(epochs := given["num_train_epochs"]) == int(float(epochs)):
        made.set("train.epochs", int(float(epochs)), "num_train_epochs")
    else:
        made.note("num_train_epochs", f"{epochs} is no whole number: give train.steps")
    _join_optimizer(given, made)
    trackers = given.get("report_to") or "none"
    if trackers not in ("none", "all", ["none"], ["all"]):
        names = trackers if isinstance(trackers, str) else ",".join(map(str, _list(trackers)))
        made.set("train.track", names, "report_to")
    _join_warmup(given, made)
    _join_saving(given, made)


def _join_optimizer(given: Given, made: _Translation) -> None:
    beta2 = given.get("adam_beta2")
    if beta2 is None and _OPTIMIZERS.get(str(given.get("optim"))) == "lion":
        beta2 = 0.999  # they give lion the decays of Adam
    if beta2 is not None:
        made.set("train.beta2", beta2, "adam_beta2")
    if given.get("lr_scheduler_type") == "warmup_stable_decay":
        made.note("lr_scheduler_type", "wsd falls linearly over train.decay_share, there a cosine")


def _join_warmup(given: Given, made: _Translation) -> None:
    for name in ("warmup_steps", "warmup_ratio"):
        value = float(given.get(name) or 0)
        if value > 0 and given.get("lr_scheduler_type") == "constant":
            made.note(name, "is left out: nothing warms up there, but with constant_with_warmup")
        elif value >= 1:
            made.set("train.warmup_steps", int(value), name)
        elif value > 0:
            made.note(name, f"give train.warmup_steps: {value:g} of the steps of the run")


def _join_saving(given: Given, made: _Translation) -> None:
    if given.get("save_strategy", "steps") == "steps" and float(given["save_steps"]) >= 1:
        made.set("train.save_every", int(given["save_steps"]), "save_steps")
    elif given.get("save_strategy") == "epoch":
        made.note("save_strategy", "give train.save_every in steps; the end is saved in any case")


def _join_evaluation(given: Given, made: _Translation) -> None:
    """Translate when to evaluate, for a run with held-out pairs."""
    steps = given.get("eval_steps", given.get("logging_steps"))
    if given.get("eval_strategy") == "steps" and steps is not None:
        made.set("train.eval_every", int(steps), "eval_steps")
    elif given.get("eval_strategy") == "epoch":
        made.note("eval_strategy", "give train.eval_every in steps; the end is evaluated anyway")
    if given.get("load_best_model_at_end"):
        made.set("train.keep_best", True, "load_best_model_at_end")
        metric = given.get("metric_for_best_model")
        if metric not in (None, "loss", "eval_loss"):
            made.note("metric_for_best_model", f"{metric}: the best is that of the lowest loss")


def _join_numerics(given: Given, weights: object, made: _Translation) -> None:
    """Translate the dtype of arithmetic and of the weights."""
    if weights in ("bfloat16", "bf16"):
        made.set("train.dtype", "bfloat16", "dtype")
    elif given.get("fp16"):
        made.set("train.dtype", "fp16-mixed", "fp16")
    elif given.get("bf16"):
        made.set("train.dtype", "bf16-mixed", "bf16")
    elif given.get("tf32"):  # says nothing of products in 16 bits
        made.set("train.tf32", True, "tf32")


def _join_trl(given: Given, processes: int, made: _Translation) -> None:
    _join_training(given, processes, made)
    weights = given.get("dtype", given.get("torch_dtype"))
    if weights == "auto":
        made.note("dtype", "'auto' takes the file's: give train.dtype = bfloat16 if that is meant")
    _join_numerics(given, weights, made)
    if given["max_length"] is not None or given.get("max_prompt_length") is not None:
        _translate("truncation_mode", given["truncation_mode"], _CUT, made)
    if given.get("disable_dropout") is False:
        made.note("disable_dropout", "nothing is dropped out here, adapters' inputs included")
    _join_trl_data(given, made)
    _join_trl_loss(given, made)
    if given.get("sync_ref_model"):
        every, share = (
            given.get("ref_model_sync_steps", 512),
            given.get("ref_model_mixup_alpha", 0.6),
        )
        made.set("train.reference_sync_every", every, "ref_model_sync_steps")
        made.set("train.reference_sync_share", share, "ref_model_mixup_alpha")
    bits = 4 if given.get("load_in_4bit") else 8 if given.get("load_in_8bit") else None
    if not given.get("use_peft"):
        if bits is not None:
            made.note(f"load_in_{bits}bit", "needs an adapter to train: use_peft")
        return
    targets = given.get("lora_target_modules")
    if targets is None:
        made.note("lora_target_modules", "PEFT's own layers, q_proj and v_proj of most models")
        targets = "q_proj,v_proj"
    _join_adapter(given, given.get("lora_r", 16), targets, made)
    _join_quantization(bits, bool(given.get("use_bnb_nested_quant")), made)
    _note_fp4(given, "bnb_4bit_quant_type", made)


def _join_trl_data(given: Given, made: _Translation) -> None:
    name = given.get("dataset_name")
    for index, one in enumerate(given.get("datasets") or []):
        made.note(f"datasets[{index}]", "only its path is read")
        if index == 0:
            made.set("data", one["path"], "datasets")
        else:
            made.note(one["path"], "give all sets by data = [...], their shares by mix.weights")
    if name is None:
        return
    made.set("data", name, "dataset_name")
    if not Path(name).exists():
        made.set("data_split", given["dataset_train_split"], "dataset_train_split")
    if given.get("eval_strategy", "no") != "no" and Path(name).exists():
        made.note("eval_strategy", "give held-out pairs: eval_data or eval_split")
    elif given.get("eval_strategy", "no") != "no":
        made.set("eval_data", name, "dataset_name")
        made.set("eval_data_split", given["dataset_test_split"], "dataset_test_split")
        _join_evaluation(given, made)


def _join_trl_loss(given: Given, made: _Translation) -> None:
    names = given["loss_type"]
    names = [names] if isinstance(names, str) else list(names)
    loss, options = ",".join(names), {"beta": given["beta"]}
    if len(names) > 1:
        weights = given.get("loss_weights") or [1.0] * len(names)
        loss = ",".join(f"{name}:{weight}" for name, weight in zip(names, weights, strict=True))
    smoothing = float(given.get("label_smoothing") or 0)
    if {"robust", "exo_pair", "aot", "aot_unpaired"} & set(names):
        options["label_smoothing"] = smoothing
    elif smoothing:
        made.note("label_smoothing", "TRL 1.16 reads it for robust, exo_pair and aot alone")
    if "discopop" in names:
        options["tau"] = given.get("discopop_tau", 0.05)
    if loss == "bco_pair":
        loss = "bco"
        made.note("loss_type", "bco measures from the running mean of rewards, TRL from 0")
    for name, ours, option in (("ld_alpha", "ld_dpo", "alpha"), ("use_weighting", "wpo", None)):
        value = given.get(name)
        if value is None or value is False:
            continue
        if loss != "sigmoid":
            made.note(name, f"is translated for the sigmoid loss alone, which is {loss}")
            continue
        loss = ours
        if option is not None:
            options[option] = value
    divergence = given.get("f_divergence_type", "reverse_kl")
    if divergence != "reverse_kl":
        made.note("f_divergence_type", f"{divergence}: see --loss f_dpo and its loss.divergence")
    _set_loss(loss, options, "loss_type", made)


def _set_loss(loss: str, options: Given, of: str, made: _Translation) -> None:
    made.set("loss.name", loss, of)
    for name, value in options.items():
        if name in _options_of(loss):
            made.set(f"loss.{name}", value, name)


def _options_of(loss: str) -> set[str]:
    """Name the options that a loss, or a term of a mixture, has."""
    from dataclasses import fields

    from dpo.losses import LOSSES

    terms = [LOSSES.get(term.partition(":")[0]) for term in loss.split(",")]
    return {item.name for term in terms if term is not None for item in fields(term)}


def _join_adapter(given: Given, rank: object, targets: object, made: _Translation) -> None:
    made.set("adapter.kind", "dora" if given.get("use_dora") else "lora", "use_dora")
    made.set("adapter.rank", rank, "the rank")
    made.set("adapter.alpha", given.get("lora_alpha") or 32, "lora_alpha")
    if given.get("use_rslora"):
        made.set("adapter.rslora", True, "use_rslora")
    names = targets if isinstance(targets, str) else ",".join(str(name) for name in _list(targets))
    if names not in ("all", "all-linear"):
        made.set("adapter.targets", names, "the target modules")


def _list(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else []


def _join_quantization(bits: object, is_double: bool, made: _Translation) -> None:
    if bits in (4, "4"):
        kind = "nf4-double" if is_double else "nf4"
        made.set("adapter.quantize", kind, "4-bit quantization")
    elif bits in (8, "8"):
        made.set("adapter.quantize", "int8", "8-bit quantization")


def _note_fp4(given: Given, name: str, made: _Translation) -> None:
    if given.get(name, "nf4") != "nf4":
        made.note(name, f"{given[name]}: four bits are those of nf4 here")


def _join_llama_factory(given: Given, processes: int, made: _Translation) -> None:
    if given.get("stage") != "dpo":
        raise InputError(f"{made.source}: stage is {given.get('stage')!r}, expected 'dpo'")
    _join_training(given, processes, made)
    _join_llama_factory_numerics(given, made)
    if given.get("use_muon"):
        made.set("train.optimizer", "muon", "use_muon")
    if given.get("lr_scheduler_type") == "warmup_stable_decay":
        made.set("train.decay_share", 2 / 3, "lr_scheduler_type")  # of the steps after the warm-up
    made.set(
        "train.recompute",
        "none" if given.get("disable_gradient_checkpointing") else "layer",
        "disable_gradient_checkpointing",
    )
    made.set("tokenize.truncation", "keep-start", "cutoff_len")
    made.note("cutoff_len", "prompt and answer are cut in proportion there, here at their ends")
    _join_llama_factory_data(given, made)
    _join_llama_factory_loss(given, made)
    if given.get("adapter_name_or_path") is not None:
        made.note("adapter_name_or_path", "to train an adapter on, give it as model")
    if given["finetuning_type"] != "lora":
        if given["finetuning_type"] != "full":
            made.note("finetuning_type", f"{given['finetuning_type']}: all weights are trained")
        return
    alpha = given.get("lora_alpha") or 2 * int(given["lora_rank"])
    options = {**given, "lora_alpha": alpha}
    _join_adapter(options, given["lora_rank"], given["lora_target"], made)
    double = given.get("double_quantization", True)
    _join_quantization(given.get("quantization_bit"), bool(double), made)
    _note_fp4(given, "quantization_type", made)


def _join_llama_factory_numerics(given: Given, made: _Translation) -> None:
    """Translate dtypes; what is frozen is loaded in that of the arithmetic."""
    is_frozen = given["finetuning_type"] == "lora"
    is_half = given.get("pure_bf16") or (is_frozen and given.get("bf16"))
    _join_numerics(given, "bfloat16" if is_half else None, made)
    if is_frozen and not (is_half or given.get("fp16")):
        made.note("bf16", "is off: there a GPU holds the base in 16 bits; train.dtype = bfloat16")


def _join_llama_factory_data(given: Given, made: _Translation) -> None:
    if given.get("dataset") is not None:
        made.note("dataset", f"{given['dataset']} is a name in dataset_info.json: give its file")
    if given.get("eval_dataset") is not None:
        made.note("eval_dataset", "a name in dataset_info.json: give its file as eval_data")
    size = float(given.get("val_size") or 0)
    if size >= 1:
        made.note("val_size", f"{size:g} rows: give the share as eval_split")
    elif size > 0:
        made.set("eval_split", size, "val_size")
        _join_evaluation(given, made)
    if (patience := given.get("early_stopping_steps")) is None:
        return
    if 0 < size < 1 and given.get("eval_strategy") == "steps":
        made.set("train.early_stopping", patience, "early_stopping_steps")
    else:
        made.note("early_stopping_steps", "give train.early_stopping beside train.eval_every")


def _join_llama_factory_loss(given: Given, made: _Translation) -> None:
    loss, beta = str(given["pref_loss"]), given["pref_beta"]
    options = {"beta": beta}
    if loss == "simpo":
        options["gamma"] = given.get("simpo_gamma", 0.5)
    for name, ours, option in (
        ("pref_ftx", "rpo", "alpha"),
        ("dpo_label_smoothing", "sigmoid", "label_smoothing"),
        ("ld_alpha", "ld_dpo", "alpha"),
    ):
        value = given.get(name)
        if value is None or (name != "ld_alpha" and not float(value)):
            continue
        if loss == "sigmoid":
            loss, options = ours, {**options, option: value}
        else:
            made.note(name, f"is translated for the sigmoid loss alone, which is {loss}")
    if loss == "ld_dpo":
        made.note("ld_alpha", "weighs the policy's tokens alone there, the reference's too here")
    if weight := float(given.get("pref_bco_weight") or 0):
        if loss in ("sigmoid", "hinge", "ipo") and "label_smoothing" not in options:
            loss = f"{loss}:{1 / (1 + weight):.6g},bco:{weight / (1 + weight):.6g}"
        else:
            made.note("pref_bco_weight", f"no mixture of bco with {loss} is translated")
    _set_loss(loss, options, "pref_loss", made)


PEERS: Final[Mapping[str, Peer]] = {
    "trl": Peer(_TRL, _TRL_DEFAULTS, _join_trl),
    "llama-factory": Peer(
        _LLAMA_FACTORY,
        _LLAMA_FACTORY_DEFAULTS,
        _join_llama_factory,
        frozenset({"stage", "finetuning_type", "pref_loss", "pref_beta", "cutoff_len"}),
    ),
}
