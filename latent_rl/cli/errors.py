"""What a user sees when something is wrong: one line on stderr and exit code 2."""

from __future__ import annotations

import os
import sys
import traceback

__all__ = ["EXIT_INTERRUPTED", "EXIT_USER_ERROR", "TRACEBACK_VARIABLE", "UserError", "exit_code"]

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
TRACEBACK_VARIABLE = "LATENT_RL_TRACEBACK"
_LONGEST = 600


class UserError(Exception):
    """Bad input; the message is the one line to show."""


# ValueError and TypeError because the library's own checks raise them, by rule, for bad values;
# OSError for files; ImportError for optional packages that a request needs; FloatingPointError for
# a run that diverged.
_USER_ERRORS = (UserError, ValueError, TypeError, OSError, ImportError, FloatingPointError)


def _is_reward_stop(error: Exception) -> bool:
    """Whether rewards ended the run: too many failed, or a judge's budget is spent."""
    # Without the module loaded nothing can have raised it.
    failures = sys.modules.get("latent_rl.rewards.failures")
    return failures is not None and isinstance(error, failures.RewardStop)


def exit_code(error: Exception) -> int:
    """Report an error on stderr and return the process's exit code.

    A user's error is one line, with its traceback only under ``LATENT_RL_TRACEBACK=1``. Anything
    else is a defect of this program and keeps its traceback.
    """
    usage = getattr(error, "format_message", None)  # errors of the argument parser
    if usage is None and not isinstance(error, _USER_ERRORS) and not _is_reward_stop(error):
        traceback.print_exception(error)
        return 1
    if os.environ.get(TRACEBACK_VARIABLE) == "1":
        traceback.print_exception(error)
    message = one_line(usage() if usage else describe(error))
    if message:  # a bare `latent-rl` has printed its help, and has nothing to add
        print(f"latent-rl: {message}", file=sys.stderr)  # noqa: T201
    return EXIT_USER_ERROR


def describe(error: Exception) -> str:
    """The message of an error; a file's error as 'path: reason'."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def one_line(message: str) -> str:
    """Whitespace folded, and cut where a library wrote an essay."""
    line = " ".join(message.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
