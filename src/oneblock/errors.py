"""The one exception a user meets: a line that says what is wrong and what to do about it."""


class OneblockError(Exception):
    """Something the user can mend. The command line prints it as one line, without a traceback."""
