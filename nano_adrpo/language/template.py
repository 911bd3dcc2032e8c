"""Chat templates: the small jinja programs that come with chat models and write messages as a prompt.

A template is set up as transformers sets it up, so that it writes the same text. It is a program by somebody else, and some of
what it can ask for, such as 10 ** 10 ** 9, cannot be stopped from inside. So it runs in a process of its own (files/apart.py):
there it has jinja's sandbox, half a second of the processor for each conversation, and 1 GiB of memory.
"""

import datetime
import functools
import json
from typing import NamedTuple

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from nano_adrpo.errors import InputError
from nano_adrpo.files.apart import Apart, Ended

SECONDS, LONGEST = 0.5, 10**7  # processor time and characters of one conversation


class Template(NamedTuple):
    """A template as a function: conversations, each a list of messages {"role": …, "content": …}, -> their texts."""

    text: str  # in jinja
    where: str  # the file that it is from
    values: dict  # what it may read beside the messages, such as bos_token

    def __call__(self, conversations, add_generation_prompt=True, **more):
        """Raises InputError with the template's own message, such as that of a role it does not take, and beyond a limit."""
        values = {**self.values, "add_generation_prompt": add_generation_prompt, **more}
        try:
            with Apart(__file__, "writer", SECONDS) as process:
                return [process.ask([self.text, messages, values]) for messages in conversations]
        except Ended as error:
            raise InputError(f"{self.where}: the chat template writes no prompt: {str(error)[:200]!r}") from None


def writer():
    """-> a function of [template, messages, values] that gives the text of a conversation."""
    compiled = functools.lru_cache(environment().from_string)

    def answer(question):
        template, messages, values = question
        text = write(compiled(template), messages, values)
        if len(text) > LONGEST:
            raise TemplateError(f"it has {len(text)} characters; expected at most {LONGEST}")
        return text

    return answer


def write(template, messages, values):
    """The text of a conversation. Keys that are None are left out, and a thought has both names that templates read."""
    shown = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for message in shown:
        thought = next((message[key] for key in ("reasoning_content", "thinking", "reasoning") if key in message), None)
        message |= {} if thought is None else {"thinking": thought} | message | {"reasoning_content": thought}
    return template.render(messages=shown, **{"tools": None, "documents": None, **values})


def environment():
    """jinja as transformers sets it up for chat templates."""
    jinja = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    jinja.filters["tojson"] = tojson
    jinja.globals |= {"raise_exception": raise_exception, "dict": Dict(), "namespace": Names}
    jinja.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return jinja


class Generation(Extension):
    """{% generation %} … {% endgeneration %} marks what the assistant says. The text is as without the marks."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """JSON with its letters as they are; jinja's own filter writes HTML's signs."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message):
    raise TemplateError(message)


class Dict:
    """`dict` without the rest of Python's type."""

    __call__, fromkeys = staticmethod(dict), staticmethod(dict.fromkeys)


class Names(Namespace):
    """`namespace`; a name may not begin with "_", as Python's own do."""

    def __init__(self, /, *args, **values):
        super().__init__()
        for name, value in dict(*args, **values).items():
            self[name] = value

    def __setitem__(self, name, value):
        if name.startswith("_"):
            raise SecurityError(f"the name {name!r} begins with '_'")
        super().__setitem__(name, value)
