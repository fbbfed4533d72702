"""The README.md of a trained model: what it is made of and how to use it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dpo.adapter_files import AdapterFolder, is_adapter, read_adapter
from dpo.config import RunConfig
from dpo.files import atomic_write

_HEADLINE = ("loss", "rewards/accuracy", "rewards/margin", "rewards/chosen", "rewards/rejected")


def headline(
    first: Mapping[str, float], last: Mapping[str, float]
) -> Iterator[tuple[str, float, float]]:
    """Yield name, value before and value after of the metrics that tell most of a run."""
    for name in _HEADLINE:
        if f"eval/{name}" in last:  # of unpaired answers there is no accuracy
            yield name, first[f"eval/{name}"], last[f"eval/{name}"]


def write_model_card(
    folder: Path, config: RunConfig, evaluations: Sequence[Mapping[str, float]]
) -> None:
    """Write ``folder/README.md``: base model, data, method, held-out metrics before and after.

    Args:
        folder: of the trained model, or of the adapter to its base.
        config: of the run.
        evaluations: from the first one to that of the model in ``folder``; maybe none.
    """
    adapter = read_adapter(folder) if is_adapter(folder) else None
    base, revision = config.model, config.revision
    if adapter is not None:
        base, revision = adapter.base, adapter.base_revision
    lines = [
        "---",
        f"library_name: {'transformers' if adapter is None else 'peft'}",
        *([] if Path(base).exists() else [f"base_model: {base}"]),
        "tags: [dpo, preference-optimization]",
        "---",
        "",
        f"# {_named(config.model)}, trained on preferences",
        "",
        f"- base model: `{_named(base)}`" + _revision(revision),
        *([] if adapter is None else [_of_adapter(adapter, config)]),
        f"- preference pairs: {', '.join(f'`{_named(source)}`' for source in config.sources)}"
        + _revision(config.data_revision),
        f"- loss: `{config.loss.name}`"
        + "".join(f", {name} = {value}" for name, value in config.loss.options.items()),
        f"- learning rate: {config.train.learning_rate}, {config.train.batch_size} pairs a step, "
        f"numerics {config.train.dtype}, seed {config.train.seed}",
        "",
        "Made with dpo-engine, after Rafailov et al. 2023, Direct Preference Optimization, "
        "arXiv 2305.18290.",
        "",
    ]
    if evaluations:
        lines += ["| held-out pairs | before | after |", "| --- | --- | --- |"]
        shown = headline(evaluations[0], evaluations[-1])
        lines += [f"| {name} | {before:.4f} | {after:.4f} |" for name, before, after in shown]
        lines.append("")
    atomic_write(folder / "README.md", "\n".join(lines))


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
