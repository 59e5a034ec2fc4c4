"""The exceptions that end a run on purpose, and the exit status each of them has on the command line."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_INPUT = 2
EXIT_PREEMPTED = 75
"""A signal stopped the run after a checkpoint: run the same command with `resume=auto` (BSD's EX_TEMPFAIL)."""
EXIT_STALLED = 76
"""Nothing moved for longer than the watchdog allows."""
EXIT_STOPPED = 77
"""A limit of the config was passed: too much bad data, too many bad steps, too many failed saves."""


class InputError(ValueError):
    """Wrong input: the message says what was given, what was expected and what to change.

    The command line prints it as one line and exits with status 2; any other exception is a bug and keeps
    its traceback.
    """


class Preempted(Exception):
    """A signal ended the run after a checkpoint was saved; the message says how to go on (exit status 75)."""


class LimitReached(Exception):
    """A run ended itself because a limit of its config was passed; the message says which (exit status 77)."""


class RunFailed(Exception):
    """Something outside of the program ended the run, a killed worker say; the message says what (exit status 1)."""
