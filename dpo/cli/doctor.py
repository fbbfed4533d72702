"""``dpo doctor``."""

import click

from dpo.errors import RunError


@click.command
def doctor() -> None:
    """Say what is installed, which devices there are, and train for a moment on each.

    Exit code 1 if training is not sound here.
    """
    from dpo import doctor as examination

    for line in examination.describe_installation():
        click.echo(line)
    click.echo("self-test")
    failed = []
    for test in examination.self_tests():
        click.echo(test.describe())
        if not test.is_sound:
            failed.append(f"{test.device} in {test.dtype}")
    if failed:
        raise RunError(f"training is not sound on {', '.join(failed)}")
