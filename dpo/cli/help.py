"""What ``--help`` shows beyond the options: commands by topic, and examples of each.

A test parses every example. To add a command, name it under its topic and give it an example.
"""

from collections.abc import Mapping

TOPICS: Mapping[str, tuple[str, ...]] = {
    "Begin": ("demo", "doctor", "plan"),
    "Train": ("train", "resume", "checkpoint", "sweep", "reference", "weigh"),
    "Use": ("generate", "score", "merge", "push"),
    "From feedback to a policy": ("data", "train-policy"),
    "Is it better, how fast": ("eval", "compare", "report", "bench"),
    "Beside": ("convert-config", "completion"),
}
EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "": (
        "dpo demo",
        "dpo plan --model Qwen/Qwen3-0.6B --data pairs.jsonl",
        "dpo train --model Qwen/Qwen3-0.6B --data pairs.jsonl --eval-split 0.1 --out run",
        "dpo generate run/model --prompt 'What is DPO?'",
    ),
    "demo": ("dpo demo", "dpo demo --policy retrieval --decisions 20000 --seed 1"),
    "train": (
        "dpo train --model Qwen/Qwen3-0.6B --data pairs.jsonl --eval-split 0.1 --out run",
        "dpo train --config run.toml --set loss.beta=0.2 --adapter lora --out run",
        "torchrun --nproc-per-node 8 -m dpo train --config run.toml --parallel shard",
    ),
    "resume": ("dpo resume run", "dpo resume run --epochs 3"),
    "checkpoint": (
        "dpo checkpoint list run",
        "dpo checkpoint verify run",
        "dpo checkpoint export run --step 100 --out model",
    ),
    "sweep": (
        "dpo sweep --config run.toml --beta 0.05,0.1,0.3 --learning-rate 1e-6,5e-6 --out grid",
    ),
    "report": ("dpo report run", "dpo report run-a run-b --out runs.html"),
    "plan": ("dpo plan --model Qwen/Qwen3-0.6B --data pairs.jsonl --batch-size 64",),
    "score": (
        "dpo score --model run/model --reference Qwen/Qwen3-0.6B --data held.jsonl --out s.jsonl",
    ),
    "reference": ("dpo reference --model Qwen/Qwen3-0.6B --data pairs.jsonl",),
    "weigh": ("dpo weigh --model Qwen/Qwen3-0.6B --data answers.jsonl --out weighed.jsonl",),
    "merge": ("dpo merge --adapter run/model --out merged --dtype bfloat16",),
    "push": ("dpo push run OWNER/NAME --private", "dpo push merged OWNER/NAME --revision seed-1"),
    "generate": (
        "dpo generate run/model --prompt 'What is DPO?' --temperature 0.7",
        "echo 'Once upon a time' | dpo generate run/model --raw",
    ),
    "data": (
        "dpo data check pairs.jsonl",
        "dpo data build extraction --feedback feedback.db --out dataset",
        "dpo data export dataset --format huggingface --out exported",
    ),
    "train-policy": (
        "dpo train-policy extraction --dataset dataset --out policy --learning-rate 1e-3",
    ),
    "eval": (
        "dpo eval policy/dpo/model --data dataset/extraction_examples_eval.jsonl",
        "dpo eval scores.jsonl",
    ),
    "compare": (
        "dpo compare rules policy/dpo/model --data dataset/extraction_examples_eval.jsonl",
        "dpo compare before.jsonl after.jsonl",
    ),
    "convert-config": (
        "dpo convert-config dpo.yaml > run.toml",
        "dpo convert-config dpo.yaml --from llama-factory --processes 8 > run.toml",
    ),
    "completion": (
        "dpo completion bash > ~/.local/share/bash-completion/completions/dpo",
        'dpo completion zsh > "${fpath[1]}/_dpo"',
        "dpo completion fish > ~/.config/fish/completions/dpo.fish",
    ),
    "doctor": ("dpo doctor",),
    "bench": ("dpo bench --suite quick", "dpo bench compare old.json new.json"),
}


def examples_of(command: str) -> str:
    """Lay out the examples of a command, or of all of them for ``""``, as click shows an epilog."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in EXAMPLES[command])
