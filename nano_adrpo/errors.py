"""What a user did wrong becomes one line; a bug keeps its traceback.

The library raises `InputError` (a ValueError) for a bad file, key, option or number, with a message that names it and says what
was expected. `run_command` turns it into `error: …` and exit status 2. Every other exception passes through with its traceback.
"""

import argparse
import contextlib
import sys


class InputError(ValueError):
    """What the user gave does not fit. The message is one line: the file, key or option, and what was expected."""


class MissingFile(InputError, FileNotFoundError):
    """A file or folder is not there."""


class NotFinite(InputError, FloatingPointError):
    """A loss, gradient, reward or logit is not a finite number."""


@contextlib.contextmanager
def about(subject):
    """Puts `subject`, such as the name of an option or a file, in front of an InputError that is raised inside."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{subject}: {error}") from None


class Parser(argparse.ArgumentParser):
    """Options must be spelt in full. A wrong one is one line, not a page of usage."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def run_command(main):
    """Calls a command's main(). An InputError, or an OSError such as a full disk, becomes `error: …` and exit status 2."""
    try:
        main()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted")
