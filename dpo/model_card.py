"""The README.md of a trained model: what it is made of, what was measured and how to use it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Final

from dpo.adapter_files import AdapterFolder, is_adapter, read_adapter
from dpo.config import RunConfig
from dpo.files import atomic_write
from dpo.hub import PAIR_SUFFIXES, is_dataset_id
from dpo.losses import LOSSES, Loss, Mixture
from dpo.report import interval
from dpo.train_config import TrainConfig

CARD: Final = "README.md"

_HEADLINE = ("loss", "rewards/accuracy", "rewards/margin", "rewards/chosen", "rewards/rejected")
_LICENCE = ("license", "license_name", "license_link")
_LONGEST_METADATA = 2**16  # bytes of a base's card that are looked at for its licence
_MAIN_OPTIONS = ("learning_rate", "batch_size", "epochs", "steps", "schedule", "optimizer", "dtype")
_OF_THE_MACHINE = {
    "device",
    "threads",
    "resume",
    "max_time",
    "save_before_end",
    "keep",
    "log_every",
}
_DPO_CITATION = """```bibtex
@inproceedings{rafailov2023direct,
  title = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
  author = {Rafael Rafailov and Archit Sharma and Eric Mitchell and Stefano Ermon and
    Christopher D. Manning and Chelsea Finn},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  url = {https://arxiv.org/abs/2305.18290}
}
```"""


def headline(
    first: Mapping[str, float], last: Mapping[str, float]
) -> Iterator[tuple[str, float, float]]:
    """Yield name, value before and value after of the metrics that tell most of a run."""
    for name in _HEADLINE:
        if f"eval/{name}" in last:  # of unpaired answers there is no accuracy
            yield name, first[f"eval/{name}"], last[f"eval/{name}"]


def write_model_card(
    folder: Path,
    config: RunConfig,
    evaluations: Sequence[Mapping[str, float]],
    *,
    base_folder: Path | None = None,
    hardware: str | None = None,
) -> None:
    """Write ``folder/README.md``: base model, data, method, options, metrics, how to use it.

    Args:
        folder: of the trained model, or of the adapter to its base.
        config: of the run.
        evaluations: from the first one to that of the model in ``folder``; maybe none.
        base_folder: of the model that was trained, whose licence is carried over if its card names
            one.
        hardware: what it was trained on, in words, if that is known.
    """
    adapter = read_adapter(folder) if is_adapter(folder) else None
    base, revision = config.model, config.revision
    if adapter is not None:
        base, revision = adapter.base, adapter.base_revision
    licence = {} if base_folder is None else licence_of(base_folder)
    lines = [
        *_front_matter(config, base, adapter, licence),
        "",
        f"# {_named(config.model)}, trained on preferences",
        "",
        f"- base model: `{_named(base)}`" + _revision(revision),
        *([] if adapter is None else [_of_adapter(adapter, config)]),
        f"- preference pairs: {', '.join(f'`{_named(source)}`' for source in config.sources)}"
        + _revision(config.data_revision),
        f"- loss: `{config.loss.name}`"
        + "".join(f", {name} = {value}" for name, value in config.loss.options.items())
        + _paper(config),
        *(["- licence of the base: " + ", ".join(licence.values())] if licence else []),
        *([f"- trained on {hardware}"] if hardware else []),
        f"- made with dpo-engine {metadata.version('dpo-engine')}, torch "
        f"{metadata.version('torch')}",
        "",
        "## Use",
        "",
        _usage(adapter),
        "",
        "## Options",
        "",
        *_table(("option", "value"), _options(config)),
    ]
    if evaluations:
        shown = headline(evaluations[0], evaluations[-1])
        told = evaluations[0], evaluations[-1]
        rows = [
            (
                name,
                *(
                    f"{end[f'eval/{name}']:.4f} {interval(end, f'eval/{name}')}".strip()
                    for end in told
                ),
            )
            for name, _, _ in shown
        ]
        lines += ["## Measured", "", *_table(("held-out pairs", "before", "after"), rows)]
    lines += ["## Method", "", "Direct Preference Optimization:", "", _DPO_CITATION, ""]
    atomic_write(folder / CARD, "\n".join(lines))


def licence_of(folder: Path) -> dict[str, str]:
    """Return what the card of a model says about its licence; nothing if it says nothing.

    Plain values are read line by line: a YAML parser takes seconds over a card that is made to
    trouble it.
    """
    try:
        text = (folder / CARD).read_bytes()[:_LONGEST_METADATA].decode(errors="replace")
    except OSError:
        return {}
    found = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    lines = found[1].splitlines() if found else []
    told = [re.fullmatch(r"(\w+): *[\"']?([\w/:.][^\"'#{}\[\]]*?)[\"']? *", line) for line in lines]
    return {line[1]: line[2] for line in told if line and line[1] in _LICENCE}


def _front_matter(
    config: RunConfig,
    base: str,
    adapter: AdapterFolder | None,
    licence: Mapping[str, str],
) -> list[str]:
    """Write the metadata that the Hub reads."""
    import yaml

    is_local = Path(base).exists() or Path(base).is_absolute()
    sets = [
        name
        for name in config.sources
        if is_dataset_id(name) and not name.endswith(PAIR_SUFFIXES) and not Path(name).exists()
    ]
    told: dict[str, object] = {"library_name": "transformers" if adapter is None else "peft"}
    if not is_local:
        told["base_model"] = base
        told["base_model_relation"] = "finetune" if adapter is None else "adapter"
    told |= {"pipeline_tag": "text-generation", **licence}
    if sets:
        told["datasets"] = sets
    told["tags"] = ["dpo", "preference-optimization"] + (["lora"] if adapter is not None else [])
    text: str = yaml.safe_dump(told, sort_keys=False, allow_unicode=True)
    return ["---", text.rstrip("\n"), "---"]


def _options(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the main options and those that are no defaults, but for what is of the machine."""
    defaults = TrainConfig()
    for field in fields(config.train):
        name, value = field.name, getattr(config.train, field.name)
        is_told = value != getattr(defaults, name) or name in _MAIN_OPTIONS
        if is_told and value not in (None, {}) and name not in _OF_THE_MACHINE:
            yield f"`train.{name}`", f"`{value}`"
    yield "`train.seed`", f"`{config.train.seed}`"
    for name, value in config.flat().items():
        if name.startswith("tokenize.") and value is not None:
            yield f"`{name}`", f"`{value}`"


def _table(head: Sequence[str], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [head, ["---"] * len(head), *dict.fromkeys(rows)]
    return [*(f"| {' | '.join(cells)} |" for cells in lines), ""]


def _usage(adapter: AdapterFolder | None) -> str:
    package, kind = ("transformers", "AutoModelForCausalLM")
    if adapter is not None:
        package, kind = ("peft", "AutoPeftModelForCausalLM")
    return f"""```python
from {package} import {kind}
from transformers import AutoTokenizer

name = "OWNER/NAME"  # or the folder that this card lies in
model = {kind}.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
ids = tokenizer("Hello", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(input_ids=ids, max_new_tokens=50)[0]))
```"""


def _paper(config: RunConfig) -> str:
    """Name the papers of a loss that has some."""
    loss = config.loss.build()
    terms: list[Loss] = [term for term, _ in loss.terms] if isinstance(loss, Mixture) else [loss]
    known = [type(term).__doc__ or "" for term in terms if type(term) in LOSSES.values()]
    papers = dict.fromkeys(re.findall(r"arXiv:(\d{4}\.\d{5})", " ".join(known)))
    return "".join(f", [arXiv:{paper}](https://arxiv.org/abs/{paper})" for paper in papers)


def _of_adapter(found: AdapterFolder, config: RunConfig) -> str:
    adapter, held = found.adapter, config.adapter.quantize
    return (
        f"- {'DoRA' if adapter.is_dora else 'LoRA'} adapter: rank {adapter.rank}, alpha "
        f"{adapter.alpha:g}{', rank-stabilized' if adapter.is_rslora else ''}"
        f"{f', trained on the base in {held}' if held else ''}; `dpo merge` makes a plain model"
    )


def _named(source: str) -> str:
    """Name a source without the path to it on this machine."""
    path = Path(source)
    return path.resolve().name if path.exists() or path.is_absolute() else source


def _revision(revision: str | None) -> str:
    return "" if revision is None else f", revision `{revision}`"
