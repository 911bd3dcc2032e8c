"""What a user did wrong becomes one line; a bug keeps its traceback.

The library raises `InputError` (a ValueError) for a bad file, key, option or number, with a message that names it and says what
was expected. `run_command` turns it into `error: …` and exit status 2. Every other exception passes through with its traceback.

Names and texts from files may hold anything, such as codes that move a terminal's cursor. `shown` makes them fit to print.
"""

import argparse
import contextlib
import re
import sys
import unicodedata

LONGEST = 1000  # characters of a message


def shown(text, longest=LONGEST, keep=""):
    """A text as one line that is fit to print: what is no letter, sign or blank, nor in `keep`, is written as Python escapes
    it, and of a long text the middle is left out."""
    text = str(text)
    if len(text) > longest:
        text = f"{text[: longest * 2 // 3]} … {text[-longest // 3 :]}"
    fits = {each for each in set(text) if each.isprintable() or unicodedata.category(each) == "Zs" or each in keep}
    return "".join(each if each in fits else each.encode("unicode_escape").decode() for each in text)


class InputError(ValueError):
    """What the user gave does not fit. The message is one line: the file, key or option, and what was expected."""

    def __str__(self):
        return shown(super().__str__())


class MissingFile(InputError, FileNotFoundError):
    """A file or folder is not there."""


class NotWritten(InputError, OSError):
    """A file cannot be written: no space, no folder, no permission."""


class NotFinite(InputError, FloatingPointError):
    """A loss, gradient, reward or logit is not a finite number."""


@contextlib.contextmanager
def about(subject):
    """Puts `subject`, such as the name of an option or a file, in front of an InputError that is raised inside."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{subject}: {error}") from None


@contextlib.contextmanager
def writing(path):
    """Names the path where something inside cannot be written, as on a full disk."""
    try:
        yield
    except NotWritten:
        raise
    except OSError as error:
        raise NotWritten(f"{path}: cannot be written ({error.strerror or error})") from None


class Parser(argparse.ArgumentParser):
    """Options must be spelt in full. A wrong one is one line, not a page of usage. An empty text, such as a shell's variable
    that is not set, is refused but where a TEXT is asked for."""

    def __init__(self, description=None, **options):
        kind = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(description=description, allow_abbrev=False, formatter_class=kind, **options)
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")  # argparse's own knows no -1e-3

    def parse_args(self, args=None, namespace=None):
        found = super().parse_args(args, namespace)
        for action in self._actions:
            value = getattr(found, action.dest, None)
            if action.metavar != "TEXT" and "" in (value if isinstance(value, list) else [value]):
                self.error(f"{'/'.join(action.option_strings) or action.dest}: expected a text that is not empty")
        return found

    def error(self, message):
        print(f"error: {shown(message)}", file=sys.stderr)
        sys.exit(2)


def run_command(main):
    """Calls a command's main(). An InputError, or an OSError such as a full disk, becomes `error: …` and exit status 2."""
    try:
        main()
    except (InputError, OSError) as error:
        print(f"error: {shown(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # as a shell says it of SIGINT
