"""Chat templates: the small jinja programs that come with chat models and write messages as a prompt.

A template is set up as transformers sets it up, so that it writes the same text. It is a program by somebody else, and some of
what it can ask for, such as 10 ** 10 ** 9, cannot be stopped from inside. So it runs in a process of its own, `main`, which the
operating system ends: there it has jinja's sandbox, half a second of the processor for each conversation, and 1 GiB of memory.
"""

import contextlib
import datetime
import json
import os
import resource
import signal
import subprocess
import sys
from typing import NamedTuple

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from nano_adrpo.errors import InputError

SECONDS, MEMORY, LONGEST = 0.5, 2**30, 10**7  # processor time and characters of one conversation, bytes of the process


class Template(NamedTuple):
    """A template as a function: conversations, each a list of messages {"role": …, "content": …}, -> their texts."""

    text: str  # in jinja
    where: str  # the file that it is from
    values: dict  # what it may read beside the messages, such as bos_token

    def __call__(self, conversations, add_generation_prompt=True, **more):
        """Raises InputError with the template's own message, such as that of a role it does not take, and beyond a limit."""
        values = {**self.values, "add_generation_prompt": add_generation_prompt, **more}
        lines = "\n".join(json.dumps(each) for each in ([self.text, values], *conversations))
        command = [sys.executable, "-P", "-m", "nano_adrpo.language.template"]  # -P and the path: it imports what this one does
        path = {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, input=lines, capture_output=True, text=True, env=os.environ | path)
        if done.returncode == 0:
            return [json.loads(line) for line in done.stdout.splitlines()]
        slow = done.returncode == -signal.SIGPROF
        reason = f"it takes more than {SECONDS} s" if slow else (done.stderr.splitlines() or [f"exit {done.returncode}"])[-1]
        raise InputError(f"{self.where}: the chat template writes no prompt: {reason[:200]!r}")


def main():
    """Reads the template and its values, then conversations, one a line; writes their texts, one a line, each as JSON."""
    with contextlib.suppress(ValueError, OSError):  # where the system allows less already
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    template, values = json.loads(sys.stdin.readline())
    try:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process
        template = environment().from_string(template)
        for line in sys.stdin:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            text = write(template, json.loads(line), values)
            if len(text) > LONGEST:
                raise TemplateError(f"it has {len(text)} characters; expected at most {LONGEST}")
            print(json.dumps(text))
    except Exception as error:  # noqa: BLE001, a template can raise whatever Python can
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")


def write(template, messages, values):
    """The text of a conversation. Keys that are None are left out, and a thought has both names that templates read."""
    shown = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for message in shown:
        thought = next((message[key] for key in ("reasoning_content", "thinking", "reasoning") if key in message), None)
        message |= {} if thought is None else {"thinking": thought} | message | {"reasoning_content": thought}
    return template.render(messages=shown, tools=None, documents=None, **values)


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


if __name__ == "__main__":
    main()
