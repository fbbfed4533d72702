"""Several processes that train one model, over gloo: the same as one process alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dpo.checkpoint import load_checkpoint
from dpo.cli import COMMANDS, main
from dpo.config import RunConfig
from dpo.device import choose_device
from dpo.distributed import BUCKET_BYTES, buckets
from dpo.errors import InputError
from dpo.inputs import find_models
from dpo.launch import Launch
from dpo.losses import LOSSES
from dpo.parallel import check_parts, kind_of_ranks
from dpo.ranks import Ranks
from dpo.scoring import MicroBatches
from dpo.sharding import HybridRanks
from dpo.tokenization import TokenizedPairs
from dpo.train_config import TrainConfig

MakePairs = Callable[..., TokenizedPairs]
RANKS = Path(__file__).parent / "ranks"
COMMAND = "from dpo.cli import main; main(prog_name='dpo')"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}

# 10 pairs, 4 a step: the last step has two rows, which leaves a third rank without work.
QUICK: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "kto": {"loss": "kto", "unpaired": True},
    "bco with experts": {"loss": "bco", "experts": True, "options": {"router_loss": 0.5}},
    "lora": {"lora": "q_proj,down_proj"},
    "no memory on one rank": {"short_rank": 1, "options": {"batch_size": 10}},
    "rows that are not finite": {"is_poisoned": True},
    "sharded": {"is_sharded": True},
    "sharded bco": {"is_sharded": True, "loss": "bco", "options": {"batch_size": 1}},
}
SLOW: dict[str, dict[str, Any]] = {
    **{f"loss {name}": {"loss": name} for name in LOSSES},
    **{f"unpaired {name}": {"loss": name, "unpaired": True} for name in ("kto", "bco")},
    "without sharing": {"options": {"share_prefix": False}},
    "whole steps without sharing": {"loss": "dr_dpo", "options": {"share_prefix": False}},
    "prompts together": {"options": {"group_prompts": True}},
    "one prompt": {"prompts": 1},
    "one pair a step": {"options": {"batch_size": 1}},
    "whole steps of one pair": {"loss": "dr_dpo", "options": {"batch_size": 1}},
    "pairs one by one": {"options": {"micro_batch_size": 1}},
    "whole steps one by one": {"loss": "bco", "options": {"micro_batch_size": 1}},
    "router loss": {"experts": True, "options": {"router_loss": 0.5}},
    "lora of a whole step": {"lora": "q_proj,lm_head", "loss": "aot"},
    "a moving reference": {"options": {"reference_sync_every": 2}},
    "an average": {"options": {"ema_decay": 0.5}},
    "windows of two steps": {"options": {"log_every": 2}},
    "early stopping": {"steps": 9, "options": {"eval_every": 1, "early_stopping": 1}},
    "steps that are skipped": {"is_poisoned": True, "options": {"on_nonfinite": "skip"}},
    **{
        f"no memory on rank {rank}, {loss}": {
            "short_rank": rank, "loss": loss, "options": {"batch_size": 10},
        }
        for rank in (0, 1) for loss in ("kto", "dr_dpo")
    },
    **{
        name: {"options": {"optimizer": name}}
        for name in ("adamw8bit", "adafactor", "lion", "muon", "schedule-free")
    },
}  # fmt: skip
EVEN = {"vocab_size": 32}  # one entry more than there are tokens
QWEN = {**EVEN, "model_type": "qwen2", "tie_word_embeddings": False}
GEMMA = {
    **EVEN, "model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh", "head_dim": 8,
    "final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0,
}  # fmt: skip
GPT = {
    **EVEN, "model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128,
    "n_inner": 24,
}  # fmt: skip
NEOX = {**EVEN, "model_type": "gpt_neox", "rotary_pct": 0.5, "tie_word_embeddings": False}
TENSOR: dict[str, dict[str, Any]] = {
    "llama": {"model": EVEN},
    "whole steps of biases": {"model": QWEN, "loss": "kto"},
    "statistics of tokens and norms of heads": {
        "model": {**EVEN, "model_type": "qwen3", "head_dim": 8}, "loss": "wpo",
    },
    "bounded logits": {"model": GEMMA, "options": {"batch_size": 1}},
    "biases behind a sum": {"model": GPT, "keeps_no_activations": True},
    "adapters": {"model": EVEN, "lora": "q_proj,o_proj,lm_head,down_proj"},
}  # fmt: skip
OF_TENSOR: dict[str, dict[str, Any]] = {
    "parallel blocks": {"model": NEOX, "loss": "bco"},
    "rows that are not finite": {"model": EVEN, "is_poisoned": True},
    "unpaired": {"model": QWEN, "loss": "kto", "unpaired": True},
    "lion": {"model": EVEN, "options": {"optimizer": "lion", "max_grad_norm": None}},
    "without sharing": {"model": EVEN, "options": {"share_prefix": False}},
    "an average": {"model": EVEN, "options": {"ema_decay": 0.5}},
    "averages of the optimizer": {"model": EVEN, "options": {"optimizer": "schedule-free"}},
    "sharded": {"model": EVEN, "is_sharded": True},
    "sharded with biases": {"model": GPT, "is_sharded": True, "loss": "bco"},
    "sharded adapters": {"model": EVEN, "is_sharded": True, "lora": "q_proj,lm_head,down_proj"},
}
OF_WHOLE_DISTRIBUTIONS = ("tdpo1", "tdpo2")  # of the reference, which is then held in memory
SHARDED: dict[str, dict[str, Any]] = {
    **{f"loss {name}": {"loss": name} for name in LOSSES if name not in OF_WHOLE_DISTRIBUTIONS},
    "unpaired": {"loss": "kto", "unpaired": True},
    "without sharing": {"options": {"share_prefix": False}},
    "one pair a step": {"options": {"batch_size": 1}},
    "whole steps of one pair": {"loss": "dr_dpo", "options": {"batch_size": 1}},
    "pairs one by one": {"loss": "bco", "options": {"micro_batch_size": 1}},
    "no activations kept": {"keeps_no_activations": True},
    "experts": {"experts": True, "options": {"router_loss": 0.5}},
    "lora": {"lora": "q_proj,down_proj"},
    "lora of the output": {"lora": "q_proj,lm_head", "loss": "aot"},
    "lion": {"options": {"optimizer": "lion"}},
    "an average": {"options": {"ema_decay": 0.5, "eval_every": 1}},
    "averages of the optimizer": {"options": {"optimizer": "schedule-free", "eval_every": 1}},
    "compiled, no activations kept": {"is_compiled": True, "keeps_no_activations": True},
    "compiled lora": {"is_compiled": True, "lora": "q_proj,down_proj"},
    "no clipping": {"options": {"max_grad_norm": None}},
    "rows that are not finite": {"is_poisoned": True},
    "steps that are skipped": {"is_poisoned": True, "options": {"on_nonfinite": "skip"}},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def compared(
    count: int, cases: dict[str, dict[str, Any]], device: str = "cpu"
) -> dict[str, dict[str, Any]]:
    """Run cases on so many ranks and alone."""
    done = subprocess.run(
        [sys.executable, str(RANKS / "equality.py"), device, str(count), json.dumps(cases)],
        stdout=subprocess.PIPE, text=True, check=True, env=os.environ | ONE_THREAD,
    )  # fmt: skip
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


def assert_equal(name: str, found: dict[str, Any], *, tolerance: float = 1e-10) -> None:
    assert found["ranks_are_equal"], name
    assert found["names_are_equal"], name
    assert found["weights"] < tolerance, (name, found["weights"])
    assert found["metrics"][0] < tolerance, (name, found["metrics"])
    rows, rows_alone = found["rows"]
    assert rows == rows_alone, name


def need_two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL gives each process a GPU of its own: this needs two")


# --- a step -------------------------------------------------------------------------------------


def with_matrices_in_two(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {f"matrices: {name}": {**case, "tensor_ranks": 2} for name, case in cases.items()}


@pytest.fixture(scope="module")
def on_two_ranks() -> dict[str, dict[str, Any]]:
    return compared(2, QUICK | with_matrices_in_two(TENSOR))


def test_steps_on_two_ranks_equal_those_of_one(on_two_ranks: dict[str, dict[str, Any]]) -> None:
    found = {name: on_two_ranks[name] for name in QUICK}
    for name, case in found.items():
        assert_equal(name, case)
        assert (case["moved"] > 1e-3) == (name != "rows that are not finite"), name
    assert found["no memory on one rank"]["notes"] > 0
    assert found["rows that are not finite"]["rows"][0]


def test_steps_with_matrices_in_parts_equal_those_of_one_rank(
    on_two_ranks: dict[str, dict[str, Any]],
) -> None:
    for name in with_matrices_in_two(TENSOR):
        assert_equal(name, on_two_ranks[name])
        assert on_two_ranks[name]["moved"] > 1e-3, name


@pytest.mark.slow
def test_steps_of_two_models_with_matrices_in_two_equal_those_of_one_rank() -> None:
    for name, case in compared(4, with_matrices_in_two(TENSOR | OF_TENSOR)).items():
        assert_equal(name, case)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_steps_of_every_kind_on_ranks_equal_those_of_one(count: int) -> None:
    for name, case in compared(count, QUICK | SLOW).items():
        assert_equal(name, case)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_steps_of_a_model_in_parts_equal_those_of_one_rank(count: int) -> None:
    cases = {name: {**case, "is_sharded": True} for name, case in SHARDED.items()}
    for name, case in compared(count, cases).items():
        assert_equal(name, case)


@pytest.mark.slow
def test_steps_of_a_model_on_each_of_two_machines_equal_those_of_one_rank() -> None:
    names = ("loss sigmoid", "loss bco", "unpaired", "one pair a step", "lora of the output")
    cases = {name: {**SHARDED[name], "is_sharded": True, "machines": 2} for name in names}
    for name, case in compared(4, cases).items():
        assert_equal(name, case)


@pytest.mark.gpu
def test_steps_over_nccl_equal_those_of_one_gpu() -> None:
    need_two_gpus()
    cases = QUICK | with_matrices_in_two(TENSOR)
    cases |= {name: {**case, "is_sharded": True} for name, case in SHARDED.items()}
    for name, case in compared(2, cases, "cuda").items():
        assert_equal(name, case, tolerance=1e-8)  # a GPU adds in any order


@pytest.mark.slow
def test_steps_in_float32_differ_by_round_off() -> None:
    cases = {name: {**case, "dtype": "float32"} for name, case in QUICK.items()}
    for name, case in compared(3, cases).items():
        assert case["ranks_are_equal"]
        assert case["weights"] < 1e-4, name  # AdamW's first steps are the sign of the gradient
        assert case["metrics"][0] < 1e-3, (name, case["metrics"])


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 30), st.integers(1, 8), st.booleans(), st.integers(0, 3))
def test_every_row_is_of_one_rank_and_tokens_are_even(
    make_pairs: MakePairs, rows: int, count: int, share_prefix: bool, seed: int
) -> None:
    pairs = make_pairs(rows, seed=seed, longest=40)
    batches = MicroBatches(pairs, share_prefix=share_prefix)
    parts = batches.divide(range(rows), count)
    assert sorted(row for part in parts for row in part) == list(range(rows))
    assert len(parts) == count
    lengths = pairs.lengths()
    sizes = lengths.sum(axis=1) + (0 if share_prefix else lengths[:, 0])
    loads = [int(sizes[part].sum()) for part in parts]
    assert max(loads) <= sizes.sum() / count + sizes.max()
    assert batches.divide(range(rows), 1) == [list(range(rows))]


def test_rows_of_a_prompt_stay_together_up_to_a_share(make_pairs: MakePairs) -> None:
    pairs = make_pairs(4)
    same = pairs.take([0, 0, 1, 2, 3])
    parts = MicroBatches(same).divide(range(5), 2)
    assert any({0, 1} <= set(part) for part in parts)


def test_buckets_keep_the_order_one_dtype_and_the_size() -> None:
    tensors = [torch.zeros(BUCKET_BYTES // 16)] * 5
    tensors += [torch.zeros(3, dtype=torch.float64), torch.zeros(BUCKET_BYTES)]
    found = list(buckets(tensors))
    assert [tensor for bucket in found for tensor in bucket] == tensors
    assert [len(bucket) for bucket in found] == [4, 1, 1, 1]
    assert all(len({tensor.dtype for tensor in bucket}) == 1 for bucket in found)


def test_process_that_is_alone_exchanges_nothing() -> None:
    ranks, part = Ranks(), torch.ones(2)
    assert ranks.gather(part) is part
    assert ranks.gather(None) is None
    assert ranks.any(True)
    assert not ranks.any(False)
    assert ranks.first([3, 1]) == [3, 1]
    assert ranks.first_text("as ü") == "as ü"
    assert ranks.one_before_others(lambda: 7) == 7


# --- processes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launcher() -> Iterator[subprocess.Popen[str]]:
    """A process that has loaded torch, and forks ranks when it is told to."""
    with subprocess.Popen(
        [sys.executable, str(RANKS / "launcher.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | ONE_THREAD,
    ) as process:  # fmt: skip
        yield process
        assert process.stdin
        process.stdin.close()


@dataclass
class Launched:
    """Ranks that run, each with its own output."""

    launcher: subprocess.Popen[str]
    folder: Path
    pids: list[int]

    def ask(self, order: object) -> list[int]:
        assert self.launcher.stdin
        assert self.launcher.stdout
        self.launcher.stdin.write(json.dumps(order) + "\n")
        self.launcher.stdin.flush()
        answer: list[int] = json.loads(self.launcher.stdout.readline())
        return answer

    def ended(self) -> tuple[list[int], str, str]:
        """Wait; return the exit codes, and all output to stdout and to stderr."""
        codes = self.ask(None)
        outputs = [
            "".join((self.folder / f"{rank}.{name}").read_text() for rank in range(len(codes)))
            for name in ("out", "err")
        ]
        return codes, outputs[0], outputs[1]


Start = Callable[..., Launched]


@pytest.fixture
def launch(launcher: subprocess.Popen[str], tmp_path: Path) -> Start:
    def start(count: int, arguments: Sequence[str], code: str = COMMAND) -> Launched:
        launched = Launched(launcher, tmp_path, [])
        order = {"count": count, "code": code, "arguments": arguments, "folder": str(tmp_path)}
        launched.pids = launched.ask(order)
        return launched

    return start


OPTIONS = (
    *("--batch-size", "4", "--learning-rate", "0.01", "--schedule", "constant"),
    *("--threads", "1", "--device", "cpu"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"prompt": f"say {n}", "chosen": f" yes {n % 5}", "rejected": f" no {n % 3}"}
        for n in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


Arguments = Callable[..., list[str]]


@pytest.fixture
def arguments(model_folder: Path, data: Path) -> Arguments:
    """Make the arguments of a run."""

    def make(out: Path, *more: str, data: Path = data) -> list[str]:
        inputs = ("--model", str(model_folder), "--data", str(data), "--out", str(out))
        return ["train", *inputs, *OPTIONS, *more]

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model/model.safetensors")


def apart(folder: Path, other: Path) -> float:
    """How far the weights of two runs are apart."""
    expected = weights(other)
    return max(float((w - expected[name]).abs().max()) for name, w in weights(folder).items())


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def alone(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output


def test_run_on_two_ranks_leaves_what_a_run_of_one_leaves(
    tmp_path: Path, arguments: Arguments, launch: Start
) -> None:
    """One folder, one voice, one set of tokens and of reference log-probs."""
    options = ("--steps", "5", "--eval-split", "0.25", "--eval-every", "2", "--keep-best")
    codes, stdout, stderr = launch(2, arguments(tmp_path / "TWO", *options)).ended()
    assert codes == [0, 0], stderr
    assert stdout.count("held out") == stdout.count("report  ") == 1
    assert stderr.count("cache stored") == 2  # of the pairs and the held-out ones
    assert stderr.count("train 100%") == 1
    caches = tmp_path / "cache/dpo-engine"
    (folder,) = (caches / "reference").iterdir()
    shards = [load_file(path) for path in folder.glob("shard-*.safetensors")]
    keys = [bytes(key.tolist()) for shard in shards for key in shard["keys"]]
    assert len(keys) == len(set(keys)) == 32
    assert len(shards) == 4  # each rank computed a part, of the pairs and the held-out ones

    alone(arguments(tmp_path / "ONE", *options))
    assert apart(tmp_path / "TWO", tmp_path / "ONE") < 1e-5
    files = [{path.relative_to(folder) for path in folder.rglob("*")} - {Path(".lock")}
             for folder in (tmp_path / "ONE", tmp_path / "TWO")]  # fmt: skip
    assert files[0] == files[1]
    for found, expected in zip(lines(tmp_path / "TWO"), lines(tmp_path / "ONE"), strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if not name.startswith(("perf/", "mem/", "time/")):
                assert found[name] == pytest.approx(value, abs=1e-4), name


@pytest.mark.parametrize("options", [(), ("--adapter", "lora", "--dtype", "bf16-mixed")], ids=str)
def test_run_with_a_model_in_parts_leaves_what_a_run_of_one_leaves(
    options: tuple[str, ...], tmp_path: Path, arguments: Arguments, launch: Start
) -> None:
    more = ("--steps", "4", "--eval-split", "0.25", "--eval-every", "2", "--keep-best", *options)
    more += ("--ema-decay", "0.5")
    parts = ("--parallel", "shard", "--recompute", "layer", "--tokens-per-micro-batch", "auto")
    codes, _, stderr = launch(2, arguments(tmp_path / "PARTS", *more, *parts)).ended()
    assert codes == [0, 0], stderr
    alone(arguments(tmp_path / "ONE", *more))
    file = "model.safetensors" if not options else "adapter_model.safetensors"
    expected = load_file(tmp_path / "ONE/model" / file)
    found = load_file(tmp_path / "PARTS/model" / file)
    noise = 1e-5 if not options else 2e-2  # bfloat16 products; a step of AdamW is a sign at first
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=noise)
    states = [
        load_checkpoint(tmp_path / folder / "checkpoints/step-000004").tensors["optimizer"]
        for folder in ("ONE", "PARTS")
    ]
    assert {n: s.shape for n, s in states[0].items()} == {n: s.shape for n, s in states[1].items()}


def test_run_with_matrices_in_parts_leaves_what_a_run_of_one_leaves_and_goes_on_alone(
    tmp_path: Path, make_model_folder: Callable[..., Path], arguments: Arguments, launch: Start
) -> None:
    model = make_model_folder(tmp_path / "even", vocab_size=258)
    options = ("--steps", "4", "--save-every", "2", "--keep", "9", "--ema-decay", "0.5")
    more = (*options, "--model", str(model))
    codes, _, stderr = launch(
        2, arguments(tmp_path / "PARTS", *more, "--tensor-ranks", "2")
    ).ended()
    assert codes == [0, 0], stderr
    alone(arguments(tmp_path / "ONE", *more))
    assert 0 < apart(tmp_path / "PARTS", tmp_path / "ONE") < 1e-5
    states = [
        load_checkpoint(tmp_path / folder / "checkpoints/step-000004").tensors
        for folder in ("ONE", "PARTS")
    ]
    for stem in ("model", "optimizer"):
        for name, state in states[0][stem].items():
            torch.testing.assert_close(states[1][stem][name], state, rtol=0, atol=1e-5)
    caches = tmp_path / "cache/dpo-engine/reference"
    (shard,) = caches.glob("*/shard-*.safetensors")  # the second rank kept nothing of its own
    assert len(load_file(shard)["keys"]) == 32

    for path in (tmp_path / "PARTS/checkpoints").glob("step-000004"):
        shutil.rmtree(path)
    alone(arguments(tmp_path / "PARTS", *more, "--resume", "auto"))
    assert 0 < apart(tmp_path / "PARTS", tmp_path / "ONE") < 1e-5
    for found, expected in zip(lines(tmp_path / "PARTS"), lines(tmp_path / "ONE"), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        if found["step"] <= 2:  # of the parts
            assert found["perf/tflops_per_s"] * found["perf/step_s"] == pytest.approx(
                expected["perf/tflops_per_s"] * expected["perf/step_s"]
            )


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["data", "shard"])
def test_run_goes_on_with_any_number_of_ranks(
    parallel: str, tmp_path: Path, arguments: Arguments, launch: Start
) -> None:
    """Two, one and three ranks in turn; and two and two, which changes not a bit."""
    for folder, parts in (("MIXED", (2, 1, 3)), ("SAME", (2, 2, 2)), ("UNBROKEN", (2,))):
        for number, count in enumerate(parts, start=1):
            steps = 6 * number // len(parts)
            more = ["--steps", str(steps), "--save-every", "2", "--resume", "auto"]
            more += ["--parallel", parallel if count > 1 else "data"]
            codes, _, stderr = launch(count, arguments(tmp_path / folder, *more)).ended()
            assert codes == [0] * count, stderr
    share = tmp_path / "SAME/checkpoints/step-000006/optimizer-00002-of-00002.safetensors"
    assert share.exists() == (parallel == "shard")
    assert apart(tmp_path / "SAME", tmp_path / "UNBROKEN") == 0
    assert 0 < apart(tmp_path / "MIXED", tmp_path / "UNBROKEN") < 1e-5
    losses = [[line["loss"] for line in lines(tmp_path / folder)] for folder in ("MIXED", "SAME")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(losses[0]) == 6


@pytest.mark.gpu
@pytest.mark.parametrize("parallel", ["data", "shard"])
def test_run_on_two_gpus_goes_on_on_one(
    parallel: str, tmp_path: Path, arguments: Arguments, launch: Start
) -> None:
    need_two_gpus()
    for folder, device, counts in (("GPUS", "cuda", (2, 1, 2)), ("CPU", "cpu", (1,))):
        for number, count in enumerate(counts, start=1):
            more = ["--steps", str(6 * number // len(counts)), "--device", device]
            more += ["--resume", "auto", "--parallel", parallel if count > 1 else "data"]
            codes, _, stderr = launch(count, arguments(tmp_path / folder, *more)).ended()
            assert codes == [0] * count, stderr
    assert apart(tmp_path / "GPUS", tmp_path / "CPU") < 1e-3


def wait_for_a_step(folder: Path) -> None:
    patience = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() or not lines(folder):
        assert time.monotonic() < patience
        time.sleep(0.01)


@pytest.mark.parametrize("parallel", ["data", "shard"])
def test_signal_to_one_rank_stops_all_after_a_checkpoint(
    parallel: str, tmp_path: Path, arguments: Arguments, launch: Start
) -> None:
    more = ("--steps", "3000", "--parallel", parallel)
    launched = launch(2, arguments(tmp_path / "RUN", *more))
    wait_for_a_step(tmp_path / "RUN")
    os.kill(launched.pids[1], signal.SIGTERM)
    codes, _, stderr = launched.ended()
    assert codes == [128 + signal.SIGTERM] * 2, stderr
    assert "Traceback" not in stderr
    assert stderr.count("stopped at step") == 1
    step = int(stderr.partition("stopped at step ")[2].partition(";")[0])
    (checkpoint,) = (tmp_path / "RUN/checkpoints").iterdir()
    assert checkpoint.name == f"step-{step:06d}"
    assert len(lines(tmp_path / "RUN")) == step


def errors_in(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("Error: ")]


@pytest.mark.parametrize("parallel", ["data", "shard"])
def test_rank_that_is_killed_ends_the_others_with_one_line(
    parallel: str, tmp_path: Path, arguments: Arguments, launch: Start
) -> None:
    more = ("--steps", "3000", "--parallel", parallel)
    launched = launch(3, arguments(tmp_path / "RUN", *more))
    wait_for_a_step(tmp_path / "RUN")
    os.kill(launched.pids[1], signal.SIGKILL)
    codes, _, stderr = launched.ended()
    assert codes == [1, -signal.SIGKILL, 1], stderr
    (line,) = errors_in(stderr)
    # killed inside of the model it has come as far as the others
    # a rank that lives may be behind as well, at the moment that another one looks
    behind = r"(behind is (\d, )?1(, \d)?; )?"
    assert re.search(rf"of 3 has lost the others: {behind}one was ended from outside", line)
    assert line.endswith("Go on with --resume auto")
    assert "Traceback" not in stderr


def test_ranks_that_read_different_pairs_are_refused_in_one_line(
    tmp_path: Path, arguments: Arguments, launch: Start
) -> None:
    row = {"prompt": "say", "chosen": " yes", "rejected": " no"}
    for rank in range(2):
        path = tmp_path / f"own{rank}.jsonl"
        path.write_text(json.dumps({**row, "prompt": f"say {rank}"}) + "\n")
    command = arguments(tmp_path / "RUN", data=tmp_path / "own$RANK.jsonl")
    code = f"import os, sys; sys.argv = [*map(os.path.expandvars, sys.argv)]; {COMMAND}"
    codes, _, stderr = launch(2, command, code).ended()
    assert codes == [2, 2], stderr
    (line,) = errors_in(stderr)
    assert "the pairs differ from rank to rank: every machine must see the same files" in line


def test_error_of_one_rank_is_told_by_it_alone(
    tmp_path: Path, arguments: Arguments, launch: Start
) -> None:
    """The second rank does not find the data."""
    (tmp_path / "own0.jsonl").write_text('{"prompt": "say", "chosen": " yes", "rejected": " no"}')
    command = arguments(tmp_path / "RUN", data=tmp_path / "own$RANK.jsonl")
    code = f"import os, sys; sys.argv = [*map(os.path.expandvars, sys.argv)]; {COMMAND}"
    codes, _, stderr = launch(2, command, code).ended()
    assert codes == [1, 2], stderr
    (line,) = errors_in(stderr)
    assert line.startswith("Error: rank 1: ")
    assert "own1.jsonl" in line
    assert "Traceback" not in stderr


TORCHRUN = """
import os, signal, sys
from dpo import trainer
from dpo.cli import main

step = trainer.Trainer.train_step

def train_step(self):
    first_start = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if self.step == 3 and os.environ["RANK"] == "1" and first_start:
        os.kill(os.getpid(), signal.SIGKILL)
    step(self)

trainer.Trainer.train_step = train_step
main(prog_name="dpo")
"""


@pytest.mark.slow
def test_run_that_is_killed_under_torchrun_goes_on_by_itself(
    tmp_path: Path, arguments: Arguments
) -> None:
    script = tmp_path / "killed.py"
    script.write_text(TORCHRUN, encoding="utf-8")
    options = ("--steps", "6", "--save-every", "1", "--resume", "auto")

    def torchrun(folder: str, *what: str) -> subprocess.CompletedProcess[str]:
        launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
        return subprocess.run(
            [*launcher, "--max-restarts", "1", *what, *arguments(tmp_path / folder, *options)],
            stderr=subprocess.PIPE, text=True, check=True, env=os.environ | ONE_THREAD,
        )  # fmt: skip

    killed = torchrun("KILLED", str(script))
    torchrun("UNBROKEN", "-m", "dpo")
    assert "resuming from" in killed.stderr
    assert len(errors_in(killed.stderr)) == 1
    assert "Traceback" not in killed.stderr
    assert apart(tmp_path / "KILLED", tmp_path / "UNBROKEN") == 0
    steps = [line["step"] for line in lines(tmp_path / "KILLED")]
    assert steps == [1, 2, 3, 4, 5, 6]


LATE = """
import datetime, os, time, torch
from dpo.distributed import joined_ranks
from dpo.errors import RunError

try:
    with joined_ranks(torch.device("cpu"), timeout=datetime.timedelta(seconds=2)) as ranks:
        ranks.wait()
        time.sleep(8 * ranks.rank)
        ranks.wait()
except RunError as error:
    print(error, flush=True)
    os._exit(1)
"""


@pytest.mark.slow
def test_rank_that_does_not_answer_ends_the_others_after_a_time(launch: Start) -> None:
    codes, stdout, _ = launch(2, [], LATE).ended()
    assert codes[0] == 1
    assert stdout.startswith("rank 0 of 2 has lost the others: behind is 1; ")


def test_waiting_has_no_meaning_for_one_process(arguments: Arguments, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, arguments(tmp_path / "RUN", "--rank-timeout", "5m"))
    assert result.exit_code == 2
    assert "train.rank_timeout is for several processes" in result.stderr


# --- a model in parts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--optimizer", "muon"), "train.optimizer = muon"),
        (("--optimizer", "adamw8bit"), "train.optimizer = adamw8bit"),
        (("--adapter", "dora"), "adapter.kind = dora"),
        (("--adapter", "lora", "--quantize", "int8"), "adapter.quantize"),
        (("--loss", "tdpo1"), "a reference that is held in memory"),
        (("--reference-sync-every", "2"), "a reference that is held in memory"),
        ((), "one process: start it with torchrun"),
    ],
    ids=str,
)
def test_what_cannot_be_in_parts_is_refused_by_name(
    options: tuple[str, ...], named: str, tmp_path: Path, arguments: Arguments
) -> None:
    command = arguments(tmp_path / "RUN", "--steps", "1", "--parallel", "shard", *options)
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: train.parallel = shard does not go with ")
    assert named in result.stderr
    assert not (tmp_path / "RUN").exists()


def test_experts_cannot_be_in_parts(
    tmp_path: Path, make_model_folder: Callable[..., Path], launch: Start, arguments: Arguments
) -> None:
    experts = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    folder = make_model_folder(tmp_path / "experts", num_local_experts=2, **experts)
    more = ("--parallel", "shard", "--model", str(folder))
    codes, _, stderr = launch(2, arguments(tmp_path / "RUN", *more)).ended()
    assert codes == [2, 1]  # the second waits for the first, which is gone
    (line,) = errors_in(stderr)
    assert line.endswith(f"train.parallel = data is what experts ask for, as in {folder}")


@pytest.mark.parametrize(
    ("count", "options", "named"),
    [
        (3, {}, "3 processes, which are no multiple"),
        (4, {"parallel": "hybrid"}, "train.parallel = hybrid: take data or shard"),
        (4, {"optimizer": "muon"}, "train.optimizer = muon"),
        (4, {"compile": True}, "train.compile"),
        (4, {"offload_activations": True}, "train.offload_activations"),
        (4, {"optimizer": "adamw8bit"}, "take adamw or lion or schedule-free"),
        (1, {}, "one process"),
    ],
)
def test_what_does_not_go_with_matrices_in_parts_is_refused_by_name(
    count: int, options: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_as(0, count, count, monkeypatch)
    train = TrainConfig(tensor_ranks=2, **options)
    with pytest.raises(InputError, match=rf"train\.tensor_ranks = 2 does not go with .*{named}"):
        kind_of_ranks(RunConfig(model="M", data="D", out="R", train=train))


@pytest.mark.parametrize(
    ("changes", "size", "told"),
    [
        ({"vocab_size": 260}, 4, r"2 key heads, .* are divided by 1, 2 alone"),
        ({"vocab_size": 259}, 2, r"259 tokens of the vocabulary, which are divided by 1 alone"),
        ({"model_type": "olmo2", "vocab_size": 260}, 2, r"norms all heads of a token together"),
    ],
)
def test_model_that_has_no_such_parts_is_refused(
    changes: dict[str, Any],
    size: int,
    told: str,
    tmp_path: Path,
    make_model_folder: Callable[..., Path],
) -> None:
    folder = make_model_folder(tmp_path / "model", **changes)
    train = TrainConfig(tensor_ranks=size)
    config = RunConfig(model=str(folder), data="D", out="R", train=train)
    with pytest.raises(InputError, match=rf"train\.tensor_ranks = {size}: .*{told}"):
        check_parts(config, find_models(config))


def start_as(rank: int, count: int, local_count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process be one of several."""
    numbers = {
        "RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": local_count,
    }  # fmt: skip
    for name, number in numbers.items():
        monkeypatch.setenv(name, str(number))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


@pytest.mark.parametrize(
    ("count", "local_count", "is_refused"), [(4, 4, True), (5, 2, True), (4, 2, False)]
)
def test_copies_between_machines_need_several_equal_ones(
    count: int, local_count: int, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_as(0, count, local_count, monkeypatch)
    config = RunConfig(model="M", data="D", out="R", train=TrainConfig(parallel="hybrid"))
    if is_refused:
        with pytest.raises(InputError, match=r"hybrid does not go with one machine, or unequal"):
            kind_of_ranks(config)
    else:
        kind = kind_of_ranks(config)
        assert isinstance(kind, partial)
        assert kind.func is HybridRanks


# --- a checkpoint in shares ---------------------------------------------------------------------


def saved(count: int, folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Save and read on so many ranks; return what each wrote and held."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.ranks.shares", str(count), str(folder), json.dumps(cases)],
        stdout=subprocess.PIPE, text=True, check=True, cwd=RANKS.parent.parent,
        env=os.environ | ONE_THREAD | {"MALLOC_MMAP_THRESHOLD_": str(2**14)},
    )  # fmt: skip
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


def assert_read_as_saved(found: dict[str, dict[str, Any]]) -> None:
    for name, case in found.items():
        assert case["is_whole"], name
        assert case["is_same"], name
        assert case["is_divided_again"], name


LARGE_ENOUGH = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 4099}  # to be measured
HEADERS = 2**16  # bytes of names and places in the files of a rank
NOISE = 2**21  # bytes of a process that come and go


def test_each_rank_writes_its_share_and_no_host_holds_more_than_a_tensor(tmp_path: Path) -> None:
    """Three ranks, so that rows are divided unevenly; 27 MB, of which a tensor has up to 4."""
    cases = {"sharded": {"is_sharded": True, "dtype": "float32", "model": LARGE_ENOUGH}}
    found = saved(3, tmp_path, cases)
    assert_read_as_saved(found)
    case = found["sharded"]
    assert case["state"] > 5 * case["largest"]
    assert sum(case["written"]) < case["state"] + 3 * HEADERS
    assert max(case["written"]) < case["state"] / 3 + HEADERS
    assert max(case["held_writing"]) < case["largest"] + NOISE
    assert max(case["held_reading"]) < case["largest"] + NOISE


@pytest.mark.slow
def test_shares_of_every_kind_of_parts_make_a_whole_checkpoint(tmp_path: Path) -> None:
    """A part that two ranks have is written once, by either of them in turn."""
    parts = {"model": EVEN, "tensor_ranks": 2}
    cases: dict[str, dict[str, Any]] = {
        "machines": {"is_sharded": True, "machines": 2, "dtype": "float32"},
        "matrices": parts,
        "parts of matrices": {**parts, "is_sharded": True},
        "matrices and an average": {**parts, "model": GPT, "options": {"ema_decay": 0.5}},
        "adapters": {**parts, "lora": "q_proj,o_proj,lm_head,down_proj"},
        "adapters of parts": {"is_sharded": True, "lora": "q_proj,down_proj"},
        "copies": {},
    }
    found = saved(4, tmp_path, cases)
    assert_read_as_saved(found)
    for name in ("machines", "matrices", "parts of matrices"):
        assert max(found[name]["written"]) < 0.5 * found[name]["state"], name
    of_one_process = {"loss", "model", "optimizer", "random"}
    for name in ("adapters", "adapters of parts", "copies"):
        files = {file.removesuffix(".safetensors") for file in found[name]["files"]}
        assert files == of_one_process | {"manifest.json", "state.json"}, name


# What a test lets happen when rank 1 writes the optimizer's share at the third step.
AT_THE_THIRD = """
import os, resource, signal, sys
import dpo.checkpoint
from dpo.cli import main

write_tensors = dpo.checkpoint.write_tensors

def write(path, *rest):
    if "step-000003" in str(path) and os.environ["RANK"] == "1" and "optimizer" in path.name:
        {happens}
    return write_tensors(path, *rest)

dpo.checkpoint.write_tensors = write
main(prog_name="dpo")
"""
FULL_DISK = AT_THE_THIRD.format(happens="resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))")
KILL = AT_THE_THIRD.format(happens="os.kill(os.getpid(), signal.SIGKILL)")
SHARES = ("--parallel", "shard", "--save-every", "1", "--keep", "9")


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "more", [(), pytest.param(("--save-in-background",), marks=pytest.mark.slow)], ids=str
)
def test_full_disk_of_one_rank_ends_all_with_one_error_and_leaves_what_was_there(
    more: tuple[str, ...], tmp_path: Path, arguments: Arguments, launch: Start
) -> None:
    command = arguments(tmp_path / "RUN", "--steps", "9", *SHARES, *more)
    codes, _, stderr = launch(2, command, FULL_DISK).ended()
    assert codes == [1, 1], stderr
    (line,) = errors_in(stderr)
    assert re.search(r"rank 1: .*File too large: .*optimizer-00002-of-00002\.safetensors", line)
    assert "Traceback" not in stderr
    assert checkpoints(tmp_path / "RUN") == ["step-000001", "step-000002"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--save-in-background",)], ids=str)
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_killed_while_it_writes_leaves_what_was_there_and_the_run_goes_on_to_the_same_bits(
    rank: int, more: tuple[str, ...], tmp_path: Path, arguments: Arguments, launch: Start
) -> None:
    """The first leaves its folder under a temporary name, and removes it when it starts again."""
    options = ("--steps", "5", "--resume", "auto", *SHARES, *more)
    kill = KILL.replace('"1"', f'"{rank}"')
    codes, _, stderr = launch(2, arguments(tmp_path / "RUN", *options), kill).ended()
    assert sorted(codes) == [-signal.SIGKILL, 1], stderr
    assert codes[rank] == -signal.SIGKILL
    assert len(errors_in(stderr)) == 1
    left = ["step-000001", "step-000002"]
    assert [name for name in checkpoints(tmp_path / "RUN") if rank or ".tmp-" not in name] == left
    for folder in ("RUN", "UNBROKEN"):
        codes, _, stderr = launch(2, arguments(tmp_path / folder, *options)).ended()
        assert codes == [0, 0], stderr
    assert apart(tmp_path / "RUN", tmp_path / "UNBROKEN") == 0
    assert checkpoints(tmp_path / "RUN") == checkpoints(tmp_path / "UNBROKEN")


def test_flipped_bit_in_a_share_is_named_and_the_run_goes_back_to_the_sound_one(
    tmp_path: Path, arguments: Arguments, launch: Start
) -> None:
    folder, options = tmp_path / "RUN", (*SHARES, "--resume", "auto", "--steps")
    codes, _, stderr = launch(2, arguments(folder, *options, "2")).ended()
    assert codes == [0, 0], stderr
    share = folder / "checkpoints/step-000002/model-00002-of-00002.safetensors"
    content = bytearray(share.read_bytes())
    content[-1] ^= 1
    share.write_bytes(content)

    verified = CliRunner().invoke(main, ["checkpoint", "verify", str(folder)])
    assert verified.exit_code == 1
    assert f"{share}: damaged: sha256" in verified.output
    codes, stdout, stderr = launch(2, arguments(folder, *options, "3")).ended()
    assert codes == [0, 0], stderr
    assert stderr.count(f"{share}: damaged: sha256") == 1
    assert f"resuming from {folder / 'checkpoints/step-000001'}" in stdout + stderr
    assert [line["step"] for line in lines(folder)] == [1, 2, 3]


@pytest.mark.slow
def test_shares_written_beside_the_steps_are_those_of_a_run_that_waits(
    tmp_path: Path, arguments: Arguments, launch: Start
) -> None:
    for folder, more in (("WAITS", ()), ("GOES_ON", ("--save-in-background",))):
        command = arguments(tmp_path / folder, "--steps", "5", *SHARES, *more)
        codes, _, stderr = launch(2, command).ended()
        assert codes == [0, 0], stderr
    assert checkpoints(tmp_path / "GOES_ON") == checkpoints(tmp_path / "WAITS")
    for path in (tmp_path / "WAITS/checkpoints").glob("*/*"):
        other = tmp_path / "GOES_ON" / path.relative_to(tmp_path / "WAITS")
        assert other.read_bytes() == path.read_bytes(), path


# --- what goes over the links -------------------------------------------------------------------


def shape(layers: int, hidden: int, inner: int, heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden,
        "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": 8,
        "vocab_size": vocabulary, "max_position_embeddings": 8192, "tie_word_embeddings": False,
    }  # fmt: skip


SHAPES = {
    "8B": shape(32, 4096, 14336, 32, 128256),
    "32B": shape(64, 5120, 27648, 40, 152064),
    "70B": shape(80, 8192, 28672, 64, 128256),
}
VOLUMES = {
    name: {
        "count": count,
        "shape": SHAPES[model],
        "options": {"parallel": parallel, "tensor_ranks": size, "dtype": dtype},
    }
    for name, model, count, parallel, size, dtype in (
        ("8B on 8", "8B", 8, "shard", 1, "float32"),
        ("32B on 32", "32B", 32, "hybrid", 1, "float32"),
        ("70B on 64", "70B", 64, "shard", 1, "float32"),
        ("70B on 64, rounded", "70B", 64, "shard", 1, "bf16-mixed"),
        ("8B, 2 x 4", "8B", 8, "data", 4, "float32"),
        ("70B, 8 x 8", "70B", 64, "shard", 8, "float32"),
    )
}
MICRO_BATCH, ANSWERS = 2048, 512  # tokens


@pytest.fixture(scope="module")
def volumes(
    launcher: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, int]]:
    """What a rank holds and exchanges."""
    launched = Launched(launcher, tmp_path_factory.mktemp("volumes"), [])
    code = (RANKS / "volumes.py").read_text(encoding="utf-8")
    arguments, folder = [json.dumps(VOLUMES)], str(launched.folder)
    launched.pids = launched.ask(
        {"count": 1, "code": code, "arguments": arguments, "folder": folder}
    )
    codes, stdout, stderr = launched.ended()
    assert codes == [0], stderr
    found: dict[str, dict[str, int]] = json.loads(stdout)
    return found


def test_parts_of_a_model_are_put_together_twice_and_their_gradients_summed_once(
    volumes: dict[str, dict[str, int]],
) -> None:
    """12 bytes for a parameter of a block and 8 for one outside, of each micro-batch."""
    for name, parts, machines in (("8B on 8", 8, 1), ("32B on 32", 8, 4), ("70B on 64", 64, 1)):
        found, model = volumes[name], SHAPES[name.partition(" ")[0].strip(",")]
        outside = (2 * model["vocab_size"] + 1) * model["hidden_size"]
        of_blocks = found["whole"] - outside
        assert found["held"] == found["whole"] // parts
        assert found["allgather_base"] == 8 * of_blocks + 4 * outside
        assert found["reduce_scatter_base"] == 4 * found["whole"]
        assert found.get("allreduce", 0) == (4 * found["held"] if machines > 1 else 0)


def test_rounded_matrices_travel_in_two_bytes_and_their_gradients_in_four(
    volumes: dict[str, dict[str, int]],
) -> None:
    """Norms, and what is outside of blocks, travel as they are."""
    found, model = volumes["70B on 64, rounded"], SHAPES["70B"]
    layers, hidden = model["num_hidden_layers"], model["hidden_size"]
    outside, norms = (2 * model["vocab_size"] + 1) * hidden, 2 * layers * hidden
    matrices = found["whole"] - outside - norms
    assert found["allgather_base"] == 4 * matrices + 8 * norms + 4 * outside
    assert found["reduce_scatter_base"] == 4 * found["whole"]


def test_matrices_in_parts_sum_hidden_states_and_exchange_no_logits(
    volumes: dict[str, dict[str, int]],
) -> None:
    """Four sums of hidden states a layer, one of embeddings, one of the answers' gradients."""
    for name, size, parts in (("8B, 2 x 4", 4, 1), ("70B, 8 x 8", 8, 8)):
        found, model = volumes[name], SHAPES[name.partition(" ")[0].strip(",")]
        layers, hidden = model["num_hidden_layers"], model["hidden_size"]
        whole_on_each = (2 * layers + 1) * hidden  # the norms
        assert found["held"] * parts == (found["whole"] - whole_on_each) // size + whole_on_each
        numbers = ANSWERS * (4 + 4 * 4 + 8)  # the top, four sums, and where the top is
        sums = 4 * hidden * ((4 * layers + 1) * MICRO_BATCH + ANSWERS)
        assert found["allreduce"] == sums + numbers
        assert ("allgather_base" in found) == (parts > 1)


LARGE = """
import torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from dpo.launch import Launch
from dpo.models import Decoder, parse_config
from dpo.sharding import ShardedRanks

store = FakeStore()
dist.init_process_group("fake", store=store, rank=5, world_size=64)
config = parse_config({
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "tie_word_embeddings": False,
})
with torch.device("meta"):
    model = Decoder(config)
whole = sum(p.numel() for p in model.parameters())
ShardedRanks(Launch(rank=5, count=64), store, torch.device("cpu")).prepare(model)
print(whole, sum(p.to_local().numel() for p in model.parameters()))
"""
STORED = """
import sys, torch
from pathlib import Path
from dpo.distributed import joined_ranks
from dpo.models import load_model
from dpo.sharding import ShardedRanks

with joined_ranks(torch.device("cpu"), ShardedRanks) as ranks:
    model = load_model(Path(sys.argv[1]), ranks=ranks)
    local = [p.to_local() for p in model.parameters()]
    print(sum(part.untyped_storage().nbytes() for part in local), flush=True)
"""


ROUNDED = """
import sys, json, torch
from dpo.distributed import joined_ranks
from dpo.log_probs import token_log_probs
from dpo.models import init_model, parse_config
from dpo.models.transforms import recompute
from dpo.segments import Segments, TokenStream, plan_attention
from dpo.sharding import ShardedRanks

def gradients(joined, config, products, part=None):
    ranks = ShardedRanks(joined.launch, joined.store, joined.device, products=products)
    model = init_model(parse_config(config), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():  # gains and biases that bfloat16 does not hold
            parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    ranks.prepare(model)
    if part:
        recompute(model, part)
    ids = (torch.arange(20) * 7 + joined.rank) % 31
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(TokenStream(ids, torch.arange(20), plan_attention(Segments((20,), (None,)))))
        token_log_probs(hidden[:-1], ids[1:], model.output_head()).log_probs.sum().backward()
    return {name: p.grad.to_local() for name, p in model.named_parameters()}

with joined_ranks(torch.device("cpu")) as ranks:
    for config in json.loads(sys.argv[1]):
        plain = gradients(ranks, config, None)
        for part in (None, "mlp", "layer"):
            rounded = gradients(ranks, config, torch.bfloat16, part)
            differ = [name for name in plain if not torch.equal(plain[name], rounded[name])]
            assert not differ, (config["model_type"], part, differ)
        assert any(gradient.any() for gradient in plain.values())
"""


def test_matrices_rounded_before_they_travel_give_the_same_gradients(launch: Start) -> None:
    usual = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    llama = {**usual, "model_type": "llama", "tie_word_embeddings": True}
    norms_of_heads = {**usual, "model_type": "qwen3", "head_dim": 8}
    models = [llama, norms_of_heads, usual | QWEN, usual | GEMMA, usual | GPT, usual | NEOX]
    codes, _, stderr = launch(2, [json.dumps(models)], ROUNDED).ended()
    assert codes == [0, 0], stderr


def test_rank_keeps_nothing_but_its_part_of_what_it_reads(
    launch: Start, model_folder: Path
) -> None:
    codes, stdout, stderr = launch(2, [str(model_folder)], STORED).ended()
    assert codes == [0, 0], stderr
    whole = sum(tensor.nbytes for tensor in load_file(model_folder / "model.safetensors").values())
    assert sum(map(int, stdout.split())) == whole


def test_model_of_eight_billion_is_divided_over_64_ranks(launch: Start) -> None:
    """Without its weights, in a process group that only counts."""
    codes, stdout, stderr = launch(1, [], LARGE).ended()
    assert codes == [0], stderr
    whole, own = map(int, stdout.split())
    assert whole == 8_030_261_248
    assert own == whole // 64


# --- how a process was started ------------------------------------------------------------------


@pytest.fixture
def third_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is one of torchrun's, on a machine with two of the four."""
    numbers = {"RANK": 2, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}
    for name, number in numbers.items():
        monkeypatch.setenv(name, str(number))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


@pytest.mark.usefixtures("third_of_four")
def test_process_knows_its_place_from_the_environment() -> None:
    assert Launch.of_environment() == Launch(rank=2, count=4, local_rank=1, local_count=2)


def test_process_without_a_launcher_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    assert Launch.of_environment() == Launch()


@pytest.mark.usefixtures("third_of_four")
@pytest.mark.parametrize("command", [name for name in COMMANDS if not COMMANDS[name].takes_ranks])
def test_command_for_one_process_is_refused_under_torchrun(command: str) -> None:
    result = CliRunner().invoke(main, [command])
    assert result.exit_code == 2
    assert f"dpo {command} is for one process, and torchrun has started 4" in result.stderr


@pytest.mark.usefixtures("third_of_four")
def test_each_process_of_a_machine_takes_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(TrainConfig()) == torch.device("cuda", 1)
    assert taken == [1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=r"2 processes were started .* torch sees 1 GPUs"):
        choose_device(TrainConfig())
