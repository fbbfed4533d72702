"""Takes a step of TRL's DPO on a folder that ``datasets`` loads; runs in the peers' environment.

    PEERS/bin/python tests/data/trl_step.py MODEL DATA

Prints one JSON object: the loss and the pairs of each split.
"""

import json
import sys
import tempfile

import datasets
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model: str, data: str) -> None:
    """Train and print."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    with tempfile.TemporaryDirectory() as folder:
        loaded = datasets.load_dataset(data, cache_dir=f"{folder}/cache")
        trainer = trl.DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model),
            args=trl.DPOConfig(
                output_dir=f"{folder}/out",
                max_steps=1,
                per_device_train_batch_size=4,
                report_to="none",
                use_cpu=True,
                bf16=False,
                save_strategy="no",
            ),
            train_dataset=loaded["train"],
            eval_dataset=loaded["test"],
            processing_class=tokenizer,
        )
        loss = trainer.train().training_loss
        found = {"loss": loss, "pairs": {name: len(rows) for name, rows in loaded.items()}}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
