"""Regular expressions from files, such as those in an adapter's config. One such as `(a+)+b` takes for ever, so all that may
try a name in more than one way are matched in a process of their own (files/apart.py).
"""

import functools
import re

from nano_adrpo.errors import InputError
from nano_adrpo.files.apart import Apart, Ended

SECONDS = 0.1  # for one name
CHOICES = set("|?*+{")  # what an expression needs to try a name in more than one way


def match(pattern, name, form="{}", whole=False):
    """The groups {name: text} of `pattern`, put into `form`, in a name from its start on (whole=True: in all of it), or None.
    Raises InputError where it is no regular expression, or takes more than SECONDS."""
    question = [form.format(pattern), name, whole]
    try:
        return process().ask(question) if CHOICES & set(pattern) else matcher()(question)
    except (re.error, RecursionError, OverflowError, Ended) as error:
        raise InputError(f"{pattern!r} is not a regular expression that can be used ({error})") from None


@functools.cache
def process():
    return Apart(__file__, "matcher", SECONDS)


@functools.cache
def matcher():
    """-> a function of [pattern, name, whole]."""
    compiled = functools.lru_cache(10_000)(re.compile)

    def answer(question):
        pattern, name, whole = question
        found = (compiled(pattern).fullmatch if whole else compiled(pattern).match)(name)
        return found and found.groupdict()

    return answer
