"""``dpo generate``."""

import sys
import time
from typing import Any, get_args

import click

from dpo.errors import InputError
from dpo.progress import Console
from dpo.train_config import Device


@click.command
@click.argument("model")
@click.option("--revision", help="Commit, branch or tag of a model on the Hub.")
@click.option("--adapter-base", help="Base of a model that is an adapter [default: its own].")
@click.option("--prompt", help="What to continue or answer [default: all of stdin].")
@click.option(
    "--chat/--raw",
    "is_chat",
    default=None,
    help="Answer the prompt as a user's message in a conversation, or continue it as plain text "
    "[default: --chat if the model has a chat template].",
)
@click.option(
    "--max-new-tokens", default=256, show_default=True, help="Most tokens to write, at least 1."
)
@click.option(
    "--temperature",
    type=float,
    help="Draw tokens, with logits divided by this, above 0 [default: take the likeliest].",
)
@click.option("--top-k", type=int, help="Draw from so many of the likeliest tokens, at least 1.")
@click.option(
    "--top-p", type=float, help="Draw from the likeliest tokens that have this share, in (0, 1]."
)
@click.option("--seed", type=int, help="Seed of the draws [default: 0].")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Numerics.",
)
@click.option(
    "--device",
    type=click.Choice(get_args(Device)),
    default="auto",
    show_default=True,
    help="Where to compute; auto is a GPU if there is one.",
)
@click.option("--quiet", is_flag=True, help="Do not say how many tokens were written, how fast.")
def generate(
    model: str,
    *,
    revision: str | None,
    adapter_base: str | None,
    prompt: str | None,
    is_chat: bool | None,
    dtype: Any,  # click has checked it
    device: Any,
    quiet: bool,
    **options: Any,
) -> None:
    """Continue a text or answer a message with a saved model.

    What it writes goes to stdout, piece by piece.
    """
    text = _read_stdin() if prompt is None else prompt
    if not text:
        raise InputError("the prompt is empty: there is nothing to continue")

    from dpo.decoding import GenerateOptions
    from dpo.device import choose_device
    from dpo.generate import generate as generate_texts
    from dpo.inputs import find_model
    from dpo.precision import PRECISIONS
    from dpo.train_config import TrainConfig

    how = GenerateOptions(**options)
    where = choose_device(TrainConfig(device=device, dtype=dtype))
    folder = find_model(model, revision, base=adapter_base)
    tokenizer = folder.load_tokenizer()
    decoder = folder.load(dtype=PRECISIONS[dtype].parameters, device=where)
    if is_chat is None:
        is_chat = tokenizer.chat_template is not None
    started = time.perf_counter()
    (generation,) = generate_texts(
        decoder,
        tokenizer,
        [({"role": "user", "content": text},) if is_chat else text],
        how,
        on_text=lambda _, piece: click.echo(piece, nl=False),
    )
    seconds = time.perf_counter() - started
    click.echo()
    count = len(generation.ids)
    end = "" if generation.is_finished else ", cut off by --max-new-tokens"
    Console(quiet=quiet).say(f"{count} tokens, {count / seconds:.1f} tokens/s{end}")


def _read_stdin() -> str:
    """Read the prompt, without the line end that ``echo`` adds.

    Raises:
        InputError: there is none, or it is not UTF-8.
    """
    if sys.stdin.isatty():
        raise InputError("no prompt: give --prompt TEXT, or pipe a text in")
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"stdin: not UTF-8: {error}") from error
    return text.removesuffix("\n").removesuffix("\r")
