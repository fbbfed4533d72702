"""Train with TRL and report the loss and the time of each step; runs in the peers' environment.

    PEERS/bin/python bench/peers/trl_steps.py --model M --data pairs.jsonl --steps 5 --batch-size 8

Prints one JSON object: losses, step_seconds, reference_seconds, peak_mib and the settings. Plain
text pairs ``{prompt, chosen, rejected}`` in the order of the file, plain AdamW, constant rate, no
clipping.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer


class Stopwatch(TrainerCallback):  # type: ignore[misc]
    """Takes the loss and the wall time of every optimizer step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock of a step."""
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop it, when a GPU has done what it was given."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._started)

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        """Note the loss."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


class TimedTrainer(DPOTrainer):  # type: ignore[misc]
    """Takes the wall time of the reference pass that precedes training."""

    reference_seconds: float | None = None

    def _precompute_ref_logps(self, *arguments: Any) -> Dataset:
        started = time.perf_counter()
        dataset = super()._precompute_ref_logps(*arguments)
        self.reference_seconds = time.perf_counter() - started
        return dataset


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "bf16-mixed"], default="float32")
    parser.add_argument("--precompute", action="store_true", help="reference log-probs in advance")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    return parser.parse_args()


def _peak_mib(has_gpu: bool) -> float:
    """Return the most memory used: allocated on a GPU, else resident of this process."""
    if has_gpu:
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Train and print."""
    options = parse()
    torch.set_num_threads(options.threads)
    has_gpu = torch.cuda.is_available() and options.device != "cpu"
    dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()]
    data = Dataset.from_list(
        [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows]
    )
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            use_cpu=not has_gpu,
            torch_compile=options.compile,
            beta=options.beta,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size // options.accumulation,
            gradient_accumulation_steps=options.accumulation,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=options.dtype == "bf16-mixed",
            gradient_checkpointing=options.activation_checkpointing,
            precompute_ref_log_probs=options.precompute,
            max_length=options.max_length,
            train_sampling_strategy="sequential",
        )
        trainer = TimedTrainer(
            model=model,
            args=config,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[stopwatch],
        )
        trainer.train()
    result = {
        "losses": stopwatch.losses,
        "step_seconds": stopwatch.seconds,
        "reference_seconds": trainer.reference_seconds,
        "peak_mib": _peak_mib(has_gpu),
        "settings": vars(options) | {"data": str(options.data)},
        "torch": torch.__version__,
        "trl": trl.__version__,
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
