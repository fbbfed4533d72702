"""The two exceptions that a user of the engine is meant to see.

The command line turns ``InputError`` into exit code 2 and ``RunError`` into exit code 1, each with
its message and no traceback; anything else that escapes is a defect of this package.
"""


class InputError(ValueError):
    """What the user gave is wrong: the message says where, what was found and what was expected."""


class RunError(RuntimeError):
    """A run that began well cannot go on: a non-finite loss, a damaged checkpoint, a full disk."""
