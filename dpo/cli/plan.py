"""``dpo plan``."""

import json
from dataclasses import asdict, replace

import click

from dpo.cli.options import TRAIN_KEYS, config_flags, resolve_flags
from dpo.progress import Console
from dpo.settings import Setting

_NO_OUTPUT = Setting("out", "nothing but the plan", "dpo plan")
_PRODUCTS = (1024, 2048)  # sizes of the products by which the device at hand is judged


@click.command
@config_flags(*TRAIN_KEYS)
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    metavar="N",
    help="Plan one of N processes, on machines of up to 8, as torchrun would start them; "
    "1 if not given, of a model in parts 8, with --parallel hybrid 16.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def plan(
    context: click.Context,
    /,
    *,
    ranks: int | None,
    as_json: bool,
    print_config: bool,
    quiet: bool,
    **_flags: object,
) -> None:
    """Say what a run would take: memory by kind, tokens, time and cost on several devices.

    Takes the options of dpo train. No weight is loaded and nothing is trained; time and cost are
    estimates.
    """
    resolved = resolve_flags(context, below=[_NO_OUTPUT])
    if print_config:
        click.echo(resolved.to_toml(), nl=False)
        return
    from dpo import planner
    from dpo.bench.clock import matrix_rate
    from dpo.device import choose_device
    from dpo.inputs import find_models, load_inputs
    from dpo.precision import precision_of

    config, console = resolved.config, Console(quiet=quiet)
    # what a GPU would keep on its host is planned on any machine
    device = choose_device(replace(config.train, offload_activations=False))
    models = find_models(config)
    pairs = load_inputs(config, models, console).pairs
    console.say("rehearsing a step on tensors without memory")
    rate = matrix_rate(precision_of(config.train), device, _PRODUCTS)
    made = planner.make_plan(config, models, pairs, device=device, flops_per_s=rate, count=ranks)
    click.echo(json.dumps(asdict(made)) if as_json else "\n".join(planner.describe(made)))
