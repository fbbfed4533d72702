"""The command ``dpo``: a table of commands, each imported when it is called.

A command parses, calls the one function that does the work, and prints what comes back. To add one,
add a line to ``COMMANDS`` and a module that holds a click command or group.
"""

import difflib
import errno
import importlib
from dataclasses import dataclass

import click
from click.shell_completion import CompletionItem

from dpo.cli.help import TOPICS, examples_of
from dpo.errors import InputError, RunError
from dpo.launch import Launch


@dataclass(frozen=True, slots=True)
class Entry:
    """A command.

    Attributes:
        target: where it is, as ``module:attribute``.
        help: its line in ``dpo --help``.
        takes_ranks: whether several processes of torchrun do it together.
    """

    target: str
    help: str
    takes_ranks: bool = False


COMMANDS = {
    "demo": Entry(
        "dpo.cli.demo:demo",
        "Show the whole way on a simulated agent: feedback, pairs, SFT, DPO, evaluation.",
    ),
    "train": Entry("dpo.cli.train:train", "Train a model on preference pairs.", takes_ranks=True),
    "resume": Entry(
        "dpo.cli.resume:resume",
        "Go on with a run that was stopped or killed, or further than it was to go.",
        takes_ranks=True,
    ),
    "checkpoint": Entry(
        "dpo.cli.checkpoint:checkpoint",
        "List and verify the checkpoints of a run, or make a model of one.",
    ),
    "sweep": Entry(
        "dpo.cli.sweep:sweep", "Train every combination of some options, one run after another."
    ),
    "report": Entry(
        "dpo.cli.report:report",
        "Write a page about a run, or one that lays several runs side by side.",
    ),
    "plan": Entry(
        "dpo.cli.plan:plan",
        "Say what a run would take: memory by kind, tokens, time and cost on several devices.",
    ),
    "score": Entry(
        "dpo.cli.score:score", "Write log-probs, implicit rewards and margin of every pair."
    ),
    "reference": Entry(
        "dpo.cli.reference:reference",
        "Compute the reference log-probs of a data set and keep them for later runs.",
        takes_ranks=True,
    ),
    "weigh": Entry(
        "dpo.cli.weigh:weigh",
        "Weigh bad answers by how much likelier their prompts are among the good ones.",
    ),
    "merge": Entry(
        "dpo.cli.merge:merge", "Write the plain model that an adapter makes of its base."
    ),
    "push": Entry(
        "dpo.cli.push:push", "Push the model of a run to the Hugging Face Hub, with its card."
    ),
    "generate": Entry(
        "dpo.cli.generate:generate", "Continue a text or answer a message with a saved model."
    ),
    "data": Entry("dpo.data.cli:cli", "From an agent's feedback log to preference pairs."),
    "train-policy": Entry(
        "dpo.cli.train_policy:train_policy",
        "Train a POLICY that decides: an SFT warm start, then DPO on the pairs of a data set.",
    ),
    "eval": Entry(
        "dpo.eval.cli:evaluate",
        "Evaluate POLICY on logged decisions, or the rewards of a scored file on its pairs.",
    ),
    "compare": Entry(
        "dpo.eval.cli:compare",
        "Compare two POLICIES on the same decisions, or rank several; or compare two scored files.",
    ),
    "convert-config": Entry(
        "dpo.cli.convert_config:convert_config",
        "Translate a DPO configuration of TRL or LLaMA-Factory, YAML or JSON, to our TOML.",
    ),
    "completion": Entry(
        "dpo.cli.completion:completion",
        "Print what makes a shell complete the commands, options and values of dpo.",
    ),
    "doctor": Entry(
        "dpo.cli.doctor:doctor",
        "Say what is installed, which devices there are, and train for a moment on each.",
    ),
    "bench": Entry(
        "dpo.bench.cli:bench", "Time optimizer steps of real model shapes on this machine."
    ),
}


class InputFailure(click.ClickException):
    """The user's input is wrong."""

    exit_code = 2


class CommandTable(click.Group):
    """A group that imports the command it is asked for, and turns errors into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        count = Launch.of_environment().count
        if count > 1 and not COMMANDS[cmd_name].takes_ranks:
            raise InputFailure(
                f"dpo {cmd_name} is for one process, and torchrun has started {count}: call it by "
                "itself"
            )
        module, _, attribute = COMMANDS[cmd_name].target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        _add_examples(command, cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command of a call; one that is unknown is refused with the nearest name."""
        if args[0] not in COMMANDS:
            nearest = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        for topic, names in TOPICS.items():
            with formatter.section(topic):
                formatter.write_dl([(name, COMMANDS[name].help) for name in names])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete a command without importing it, or an option."""
        named = [
            CompletionItem(name, help=entry.help)
            for name, entry in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return named + click.Command.shell_complete(self, ctx, incomplete)

    def invoke(self, ctx: click.Context) -> object:
        """Run a command; an error that a user is meant to see becomes a message and an exit code.

        Any other exception is a defect of this package and keeps its traceback.
        """
        try:
            return super().invoke(ctx)
        except InputError as error:
            raise InputFailure(str(error)) from error
        except RunError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has gone: click's to handle
                raise
            place = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{place}{error.strerror or error}") from error
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(130)


def _add_examples(command: click.Command, name: str) -> None:
    """Add the examples of a command to its help, once."""
    examples = examples_of(name)
    if examples not in (command.epilog or ""):
        command.epilog = "\n\n".join(filter(None, [command.epilog, examples]))


@click.command(
    cls=CommandTable,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=f"{examples_of('')}\n\nExit codes: 0 done; 1 the run failed; 2 the input is wrong; 124 "
    "its time is over; 128+n stopped by signal n.",
)
@click.version_option(package_name="dpo-engine", prog_name="dpo")
def main() -> None:
    """Direct Preference Optimization: train, score and evaluate language models on preferences."""
