"""The one exception a user causes: bad input, with the fix in its message."""


class InputError(ValueError):
    """Wrong input: the message says what was given, what was expected and what to change.

    The command line prints it as one line and exits with status 2; any other exception is a bug and keeps
    its traceback.
    """
