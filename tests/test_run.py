"""Whole runs: what they write, how they find their reference, and how they end."""

import io
import json
import math
import signal
import threading
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from dpo import run
from dpo.cli import main
from dpo.config import LossConfig, ReferenceCacheConfig, RunConfig
from dpo.errors import InputError, RunError
from dpo.files import read_json
from dpo.fingerprint import weights_fingerprint
from dpo.inputs import find_models, load_inputs
from dpo.progress import Console
from dpo.reference import ReferenceCache, numerics
from dpo.reference_pass import obtain_references
from dpo.run_loop import RunResult
from dpo.settings import read_settings, resolve
from dpo.train_config import TrainConfig

MakeFolder = Callable[..., Path]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_pairs(path: Path, count: int = 16, *, chosen: str = "yes", rejected: str = "no") -> Path:
    rows = [
        {"prompt": f"say {n}", "chosen": f" {chosen} {n % 5}", "rejected": f" {rejected} {n % 3}"}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def config(tmp_path: Path, model_folder: Path) -> RunConfig:
    train = TrainConfig(
        batch_size=4, steps=4, learning_rate=1e-2, schedule="constant", threads=1, device="cpu"
    )
    data = write_pairs(tmp_path / "pairs.jsonl")
    return RunConfig(
        model=str(model_folder), data=str(data), out=str(tmp_path / "RUN"), train=train
    )


def changed(config: RunConfig, **options: Any) -> RunConfig:
    """Replace options, those of the training under their own names."""
    names = options.keys() & {field.name for field in fields(TrainConfig)}
    train = replace(config.train, **{name: options.pop(name) for name in names})
    return replace(config, train=train, **options)


def started(config: RunConfig) -> RunResult:
    return run.train(config, console=Console(io.StringIO()))


def said_by(config: RunConfig) -> str:
    said = io.StringIO()
    run.train(config, console=Console(said))
    return said.getvalue()


def weights(folder: str | Path) -> bytes:
    return (Path(folder) / "model" / "model.safetensors").read_bytes()


def metrics(folder: str | Path) -> list[dict[str, float]]:
    text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def checkpoints(folder: str | Path) -> list[int]:
    return sorted(int(path.name[-6:]) for path in (Path(folder) / "checkpoints").iterdir())


# --- what is written ----------------------------------------------------------------------------


def test_result_says_what_the_folder_holds(config: RunConfig) -> None:
    result = started(replace(config, eval_split=0.25))
    folder = Path(config.out)
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock", "checkpoints", "config.toml", "data.json", "eval_pairs.jsonl", "metrics.jsonl",
        "model", "report.html",
    ]  # fmt: skip
    assert sorted(path.name for path in result.model.iterdir()) == [
        "README.md", "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert (result.folder, result.model, result.report, result.steps) == (
        folder, folder / "model", folder / "report.html", 4,
    )  # fmt: skip
    evaluations = [line for line in metrics(folder) if "eval/loss" in line]
    assert [result.first, result.last] == [evaluations[0], evaluations[-1]]


def test_run_without_held_out_pairs_has_no_evaluations(config: RunConfig) -> None:
    result = started(config)
    assert (result.first, result.last) == (None, None)
    assert not any("eval/loss" in line for line in metrics(config.out))


def test_saved_config_gives_the_same_run_again(tmp_path: Path, config: RunConfig) -> None:
    config = replace(config, eval_split=0.25, loss=LossConfig("ipo", {"beta": 0.3}))
    started(changed(config, resume="auto"))
    again = resolve(read_settings(Path(config.out) / "config.toml")).config
    assert again.train.resume is None
    started(replace(again, out=str(tmp_path / "AGAIN")))
    assert weights(tmp_path / "AGAIN") == weights(config.out)


def test_evaluation_comes_before_the_first_step_and_every_so_often(config: RunConfig) -> None:
    started(changed(config, eval_split=0.25, eval_every=3))
    kinds = [(line["step"], "eval/loss" in line) for line in metrics(config.out)]
    assert kinds == [
        (0, True), (1, False), (2, False), (3, False), (3, True), (4, False), (4, True),
    ]  # fmt: skip
    assert metrics(config.out)[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_checkpoints_are_written_every_so_often_and_the_last_ones_kept(config: RunConfig) -> None:
    started(changed(config, steps=7, save_every=2, keep=2))
    assert checkpoints(config.out) == [6, 7]


def test_run_that_saves_at_no_step_saves_the_last(config: RunConfig) -> None:
    started(config)
    assert checkpoints(config.out) == [4]


@pytest.fixture
def contrary(tmp_path: Path, config: RunConfig) -> RunConfig:
    """A run whose held-out loss rises from the first step on: their preferences are the reverse."""
    eval_data = write_pairs(tmp_path / "contrary.jsonl", chosen="no", rejected="yes")
    return changed(config, eval_data=str(eval_data), eval_every=1)


def test_best_model_is_kept_saved_and_reported(contrary: RunConfig) -> None:
    result = started(changed(contrary, keep_best=True, keep=1))
    assert checkpoints(contrary.out) == [1, 4]
    best = load_file(Path(contrary.out) / "checkpoints" / "step-000001" / "model.safetensors")
    saved = load_file(result.model / "model.safetensors")
    assert best.keys() == saved.keys()
    assert all(torch.equal(best[name], saved[name]) for name in best)
    assert result.last is not None
    assert result.last["step"] == 1
    assert f"| {result.last['eval/loss']:.4f} " in (result.model / "README.md").read_text("utf-8")


def test_last_model_is_saved_unless_the_best_is_to_be_kept(contrary: RunConfig) -> None:
    result = started(contrary)
    assert result.last is not None
    assert result.last["step"] == 4


def test_early_stopping_ends_the_run_with_a_checkpoint_and_a_model(contrary: RunConfig) -> None:
    result = started(changed(contrary, steps=50, early_stopping=2))
    assert (result.steps, checkpoints(contrary.out)) == (3, [3])
    assert (result.model / "model.safetensors").exists()


def test_saved_model_answers_in_transformers(config: RunConfig, model_folder: Path) -> None:
    import transformers

    from dpo import load_model, load_tokenizer
    from dpo.batching import collate_answers
    from dpo.log_probs import completion_log_probs

    folder = started(config).model
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("say 3 yes")["input_ids"]
    assert ids == load_tokenizer(folder).encode("say 3 yes")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        log_probs = theirs(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected = log_probs.gather(1, torch.tensor(ids)[1:, None])[:, 0]
    prompt, answer = torch.tensor(ids[:1]).int().numpy(), torch.tensor(ids[1:]).int().numpy()
    found = completion_log_probs(load_model(folder), collate_answers([(prompt, [answer])]))
    torch.testing.assert_close(found.log_probs, expected, rtol=0, atol=1e-5)
    assert theirs.generation_config.temperature == 0.7
    assert weights(config.out) != (model_folder / "model.safetensors").read_bytes()


# --- the reference ------------------------------------------------------------------------------


def test_second_run_over_the_same_data_computes_no_reference(
    tmp_path: Path, config: RunConfig
) -> None:
    first = said_by(replace(config, eval_split=0.25))
    other = {"out": str(tmp_path / "OTHER"), "loss": LossConfig("hinge", {"beta": 0.5})}
    second = said_by(changed(config, eval_split=0.25, learning_rate=0.1, **other))
    assert "in the cache" not in first
    assert "reference: all 12 pairs are in the cache" in second
    assert "reference, held out: all 4 pairs are in the cache" in second


def test_further_pairs_are_all_that_is_computed(tmp_path: Path, config: RunConfig) -> None:
    started(config)
    shards = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("shard-*")}
    more = write_pairs(tmp_path / "more.jsonl", count=20)
    said = said_by(replace(config, data=str(more), out=str(tmp_path / "MORE")))
    tokens = sum(len(f"say {n} yes {n % 5} no {n % 3}") + 2 for n in range(16, 20))
    assert f"reference 100% {tokens}/{tokens}" in said
    assert all(path.read_bytes() == content for path, content in shards.items())


@pytest.fixture
def unloadable(tmp_path: Path, make_model_folder: MakeFolder) -> Path:
    """A model that has a fingerprint, but cannot be loaded: a weight of it has no place."""
    path = make_model_folder(tmp_path / "unloadable", seed=1) / "model.safetensors"
    save_file(load_file(path) | {"model.extra": torch.zeros(1)}, path)
    return path.parent


def test_reference_model_is_loaded_where_the_cache_lacks_something(
    config: RunConfig, unloadable: Path
) -> None:
    with pytest.raises(InputError, match="1 weights have no place in this architecture"):
        started(replace(config, reference=str(unloadable)))


def test_full_cache_leaves_the_reference_model_unloaded(
    tmp_path: Path, config: RunConfig, unloadable: Path, make_model_folder: MakeFolder
) -> None:
    sound = str(make_model_folder(tmp_path / "sound", seed=1))
    started(replace(config, reference=sound))
    cache = tmp_path / "cache" / "dpo-engine" / "reference"
    (shards,) = cache.iterdir()
    empty = ReferenceCache(
        cache,
        model="unloadable",
        fingerprint=weights_fingerprint(unloadable),
        numerics=numerics(precision="float32", device="cpu"),
    )
    for path in shards.glob("shard-*"):
        path.rename(empty.folder / path.name)

    said = said_by(replace(config, reference=str(unloadable), out=str(tmp_path / "FULL")))

    assert "reference: all 16 pairs are in the cache" in said
    assert weights(tmp_path / "FULL") == weights(config.out)


@pytest.mark.parametrize(
    ("count", "held_out", "refusal"),
    [
        (16, None, "the policy does not start at its reference"),
        (20, None, "the reference cache does not fit the reference model"),
        (16, 0.25, "the reference cache does not fit the reference model"),
    ],
    ids=["full", "partly filled", "held out"],
)
def test_cache_of_other_values_is_refused(
    tmp_path: Path,
    config: RunConfig,
    make_model_folder: MakeFolder,
    count: int,
    held_out: float | None,
    refusal: str,
) -> None:
    """The values of another model stand in the cache under this model's name."""
    other = make_model_folder(tmp_path / "other", seed=1, rope_theta=50.0)
    path = other / "model.safetensors"
    save_file({name: 3 * weight for name, weight in load_file(path).items()}, path)
    started(replace(config, model=str(other), out=str(tmp_path / "OTHER")))
    cache = tmp_path / "cache" / "dpo-engine" / "reference"
    (shards,) = cache.iterdir()
    own = ReferenceCache(
        cache,
        model="model",
        fingerprint=weights_fingerprint(Path(config.model)),
        numerics=numerics(precision="float32", device="cpu"),
    )
    for found in shards.glob("shard-*"):
        found.rename(own.folder / found.name)
    data = write_pairs(tmp_path / "pairs.jsonl", count=count)

    with pytest.raises(RunError, match=refusal):
        started(replace(config, data=str(data), eval_split=held_out))


@pytest.mark.parametrize(
    ("byte", "fault"),
    [(-1, "the key table has sha256"), (-32 * 16 - 1, "log-probs have sha256")],
)
def test_damaged_cache_is_told_and_computed_again(
    tmp_path: Path, config: RunConfig, byte: int, fault: str
) -> None:
    """A shard of 32 answers ends with their keys of 16 bytes, behind their log-probs."""
    started(config)
    (shard,) = (tmp_path / "cache").rglob("shard-*")
    content = bytearray(shard.read_bytes())
    content[byte] ^= 1
    shard.write_bytes(content)
    said = said_by(replace(config, out=str(tmp_path / "AGAIN")))
    assert said.count(f"{shard}: damaged: {fault}") == 1
    assert "in the cache" not in said
    assert weights(tmp_path / "AGAIN") == weights(config.out)


def test_tf32_has_reference_log_probs_of_its_own(tmp_path: Path, config: RunConfig) -> None:
    console, models = Console(io.StringIO()), find_models(config)
    inputs = load_inputs(config, models, console)
    for tf32 in (False, True):
        rounded = changed(config, tf32=tf32, device="auto")
        obtain_references(rounded, models, inputs, console, device=torch.device("cpu"))
    assert len(list((tmp_path / "cache" / "dpo-engine" / "reference").iterdir())) == 2


def test_cache_folder_can_be_chosen(tmp_path: Path, config: RunConfig) -> None:
    started(replace(config, reference_cache=ReferenceCacheConfig(str(tmp_path / "mine"))))
    assert list((tmp_path / "mine").rglob("shard-*"))
    assert not (tmp_path / "cache" / "dpo-engine" / "reference").exists()


def test_column_that_the_loss_ignores_is_refused_before_the_reference_is_computed(
    tmp_path: Path, config: RunConfig
) -> None:
    row = {"prompt": "say", "chosen": " yes", "rejected": " no", "margin": 1.0}
    Path(str(config.data)).write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="1 pairs have a margin"):
        started(replace(config, loss=LossConfig("sppo_hard")))
    assert not (tmp_path / "cache" / "dpo-engine" / "reference").exists()


def test_rate_of_no_parameter_is_refused_before_the_reference_is_computed(
    tmp_path: Path, config: RunConfig
) -> None:
    with pytest.raises(InputError, match=r"train\.rates: 'embedding' finds no trained parameter"):
        started(changed(config, rates={"embedding": 0.5}))
    assert not (tmp_path / "cache" / "dpo-engine" / "reference").exists()


def test_run_starts_from_another_reference(
    tmp_path: Path, config: RunConfig, make_model_folder: MakeFolder
) -> None:
    reference = make_model_folder(tmp_path / "reference", seed=1)
    started(replace(config, reference=str(reference)))
    assert metrics(config.out)[0]["rewards/margin"] != 0


def test_reference_alone_fills_the_cache_and_writes_nothing_else(config: RunConfig) -> None:
    run.compute_reference_only(replace(config, eval_split=0.25), console=Console(io.StringIO()))
    assert not Path(config.out).exists()
    assert "reference: all 16 pairs are in the cache" in said_by(config)


def test_loss_without_a_reference_makes_no_reference_pass(
    tmp_path: Path, config: RunConfig
) -> None:
    said = said_by(replace(config, loss=LossConfig("sft")))
    assert not [line for line in said.splitlines() if line.startswith("reference")]
    assert not (tmp_path / "cache" / "dpo-engine" / "reference").exists()
    assert metrics(config.out)[-1]["loss"] < metrics(config.out)[0]["loss"]


# --- what it warns of ---------------------------------------------------------------------------

BOTH_DOWN = """
def loss(pairs):
    return pairs.chosen + 9 * pairs.rejected
"""


def test_displacement_is_warned_of_once(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "both_down.py").write_text(BOTH_DOWN)
    monkeypatch.syspath_prepend(tmp_path)
    options = {"steps": 14, "batch_size": 16, "learning_rate": 0.01}
    said = said_by(changed(config, loss=LossConfig("both_down:loss"), **options))
    lines = [line for line in said.splitlines() if "likelihood displacement" in line]
    raised = [line["step"] for line in metrics(config.out) if line["displacement/alarm"]]
    assert len(lines) == 1 < len(raised)
    assert f"step {raised[0]}: likelihood displacement: for 10 lines of metrics" in lines[0]


# --- how it ends --------------------------------------------------------------------------------

POISON = """
import torch

def loss(pairs):
    values = -pairs.log_ratio_gap
    is_bad = pairs.chosen_tokens >= 12
    values[is_bad] = values[is_bad] * torch.nan
    return values
"""
FULL = """
import torch

def loss(pairs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\\nMore lines")
"""


@pytest.fixture
def poisoned(tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run in which a row of the second step makes the loss NaN."""
    lines = Path(str(config.data)).read_text(encoding="utf-8").splitlines()
    bad = {"id": "the bad one", "prompt": "say", "chosen": " a long one", "rejected": " no"}
    Path(str(config.data)).write_text("\n".join([*lines, json.dumps(bad)]) + "\n", encoding="utf-8")
    (tmp_path / "poison.py").write_text(POISON)
    monkeypatch.syspath_prepend(tmp_path)
    return changed(config, loss=LossConfig("poison:loss"))


def test_nonfinite_step_leaves_a_reproduction_a_checkpoint_and_one_message(
    poisoned: RunConfig,
) -> None:
    with pytest.raises(RunError) as refusal:
        started(poisoned)
    path = Path(poisoned.out) / "nonfinite-step-000002.jsonl"
    assert str(refusal.value) == (
        "step 2: the loss or a gradient is not finite, from rows the bad one; the weights are "
        "unchanged. Lower the learning rate, look at the rows, or give --on-nonfinite skip. "
        f"The rows as the model saw them are in {path}"
    )
    (row,) = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert (row["row"], row["id"], bytes(row["chosen_ids"][:-1])) == (
        16,
        "the bad one",
        b" a long one",
    )
    assert len(row["reference_chosen"]) == len(row["chosen_ids"]) == 12
    assert [line["step"] for line in metrics(poisoned.out)] == [1]  # the next would be step 2
    assert checkpoints(poisoned.out) == [1]
    assert not (Path(poisoned.out) / "model").exists()


def test_nonfinite_run_goes_on_when_the_step_may_be_skipped(poisoned: RunConfig) -> None:
    with pytest.raises(RunError):
        started(poisoned)
    started(changed(poisoned, on_nonfinite="skip", resume="auto"))
    lines = metrics(poisoned.out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["health/nonfinite"] for line in lines] == [0, 1, 1, 1]
    undefined = {name for name, value in lines[1].items() if value is None}
    assert undefined == {
        *("loss", "rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy"),
        *("logps/chosen", "logps/rejected", "grad_norm"),
    }
    report = (Path(poisoned.out) / "report.html").read_text(encoding="utf-8")
    assert "Optimizer steps 1 to 4, 4 recorded. Steps whose loss is not finite: 1." in report


def test_nonfinite_exits_1_with_one_line(poisoned: RunConfig) -> None:
    result = CliRunner().invoke(
        main,
        [
            *(
                "train",
                "--model",
                poisoned.model,
                "--data",
                str(poisoned.data),
                "--out",
                poisoned.out,
            ),
            *("--loss", "poison:loss", "--batch-size", "4", "--threads", "1", "--quiet"),
        ],
    )
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: step 2: the loss or a gradient is not finite")
    assert result.stderr.count("\n") == 1


def test_full_memory_is_explained_in_one_line(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full.py").write_text(FULL)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RunError) as refusal:
        started(replace(config, loss=LossConfig("full:loss")))
    assert str(refusal.value) == (
        "CUDA out of memory. Tried to allocate 2 GiB. Less memory is needed with a smaller "
        "--tokens-per-micro-batch or --micro-batch-size, a smaller --max-length, or "
        "--recompute layer"
    )


def test_run_works_in_a_thread_and_leaves_signals_alone(config: RunConfig) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    results: list[RunResult] = []
    thread = threading.Thread(target=lambda: results.append(started(config)))
    thread.start()
    thread.join()
    assert [result.steps for result in results] == [4]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_run_gives_signal_handlers_back(config: RunConfig) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    started(config)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_bfloat16_weights_are_warned_of(config: RunConfig) -> None:
    said = said_by(changed(config, dtype="bfloat16"))
    assert "bfloat16 weights do not move at the learning rates of DPO" in said
    assert read_json(Path(config.out) / "model" / "config.json")["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("option", "value"), [("recompute", "mlp"), ("recompute", "layer"), ("share_prefix", False)]
)
def test_what_saves_memory_or_time_leaves_the_losses_as_they_are(
    tmp_path: Path, config: RunConfig, option: str, value: object
) -> None:
    started(config)
    started(changed(config, **{option: value}, out=str(tmp_path / "OTHER")))
    expected = [line["loss"] for line in metrics(config.out)]
    found = [line["loss"] for line in metrics(tmp_path / "OTHER")]
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("keep_best", [False, True])
def test_average_of_the_weights_is_what_is_saved(config: RunConfig, keep_best: bool) -> None:
    """The best step is one before the last: the held-out answers are the worse ones."""
    worse = write_pairs(
        Path(str(config.data)).with_name("worse.jsonl"), chosen="no", rejected="yes"
    )
    options = {"eval_every": 1, "save_every": 1, "keep": 4, "keep_best": keep_best}
    started(changed(config, eval_data=str(worse), ema_decay=0.5, **options))
    step = 1 if keep_best else 4
    checkpoint = Path(config.out) / "checkpoints" / f"step-{step:06d}"
    states, saved = (
        load_file(checkpoint / "optimizer.safetensors"),
        load_file(Path(config.out) / "model" / "model.safetensors"),
    )
    assert all(torch.equal(saved[name], states[f"{name}/moving_average"]) for name in saved)
    weights = load_file(checkpoint / "model.safetensors")
    assert step == 1 or not any(torch.equal(saved[name], weights[name]) for name in saved)


# --- methods that need more than pairs and a cached reference -------------------------------------


def write_answers(path: Path) -> Path:
    rows = [
        {"prompt": f"say {n}", "completion": f" {'no' if n % 3 else 'yes'} {n}", "label": not n % 3}
        for n in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_lists(path: Path) -> Path:
    rows = [
        {"prompt": f"say {n}", "answers": [" no", " yes", f" {n}"], "scores": [1, 3, 2]}
        for n in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


METHODS: dict[str, tuple[str, Callable[[Path], Path], dict[str, Any]]] = {
    "kto of unpaired answers": ("kto", write_answers, {}),
    "bco of unpaired answers": ("bco", write_answers, {}),
    "kto of pairs": ("kto", write_pairs, {}),
    "lists": ("plackett_luce", write_lists, {}),
    "tdpo": ("tdpo2", write_pairs, {}),
    "a reference that moves": ("sigmoid", write_pairs, {"reference_sync_every": 2}),
    "a mixture with running statistics": ("sigmoid:0.8,bco:0.2,sft:1", write_pairs, {}),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_evaluates_and_resumes_bit_for_bit(
    method: str, tmp_path: Path, config: RunConfig
) -> None:
    name, write, options = METHODS[method]
    data = str(write(tmp_path / "data.jsonl"))
    options = {"steps": 6, "save_every": 2, "keep": 3, "eval_every": 3, **options}
    config = changed(config, data=data, loss=LossConfig(name), eval_split=0.25, **options)
    result = started(config)
    assert result.first is not None
    assert result.last is not None
    assert result.last["eval/loss"] < result.first["eval/loss"]
    resumed = replace(config, out=str(tmp_path / "RESUMED"))
    checkpoint = str(Path(config.out) / "checkpoints/step-000002")
    started(changed(resumed, resume=checkpoint))
    assert weights(resumed.out) == weights(config.out)
    steps = [line for line in metrics(config.out) if "loss" in line and line["step"] > 2]
    again = [line for line in metrics(resumed.out) if "loss" in line and line["step"] > 2]
    assert [line["loss"] for line in again] == [line["loss"] for line in steps]


def test_answers_to_other_prompts_are_cached_too(tmp_path: Path, config: RunConfig) -> None:
    config = replace(config, data=str(write_answers(tmp_path / "a.jsonl")), loss=LossConfig("kto"))
    started(config)
    assert said_by(replace(config, out=str(tmp_path / "2"))).count("are in the cache") == 2


def test_another_reference_can_be_live(
    tmp_path: Path, config: RunConfig, make_model_folder: MakeFolder
) -> None:
    other = make_model_folder(tmp_path / "other", seed=5)
    config = replace(config, reference=str(other), loss=LossConfig("tdpo2"))
    started(config)
    first = next(line for line in metrics(config.out) if "loss" in line)
    assert first["loss"] != pytest.approx(math.log(2), abs=1e-3)


def test_unpaired_rows_are_refused_by_a_loss_that_compares(
    tmp_path: Path, config: RunConfig
) -> None:
    config = replace(config, data=str(write_answers(tmp_path / "answers.jsonl")))
    with pytest.raises(InputError, match=r"16 rows have one answer .* kto or bco"):
        started(config)
