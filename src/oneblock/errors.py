"""The user-facing exception, and the hint for an optional package that is not installed."""

import sys


class OneblockError(Exception):
    """An error that the user can fix. The command line prints it as one line, without a traceback."""


def missing_extra(feature: str, package: str, extra: str) -> OneblockError:
    """The error for a feature whose optional package is missing, with the command that installs it.

    `extra` is the group in pyproject.toml that lists the package; oneblock itself is on no package index.
    """
    python = sys.executable or "python"
    install = f"{python} -m pip install {package} (or -e '.[{extra}]' in the clone)"
    return OneblockError(f"{feature} needs the package {package}, which is not installed; install it with: {install}")
