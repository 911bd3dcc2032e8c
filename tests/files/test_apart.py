"""A process of its own: answers, errors, and every way in which it can end."""

import pytest

from nano_adrpo.errors import InputError
from nano_adrpo.files import patterns
from nano_adrpo.files.apart import Apart, Ended

ASKED = """
import os

def make():
    print("what is printed is no answer")

    def answer(question):
        if question == "slow":
            while True:
                pass
        if question == "large":
            return len(bytes(2**33))
        if question == "gone":
            os._exit(3)
        return [question, 1 / (question != "error")]

    return answer
"""


def test_a_process_answers_until_it_ends_and_starts_again(tmp_path):
    (tmp_path / "asked.py").write_text(ASKED)
    with Apart(str(tmp_path / "asked.py"), "make", 0.3, 2**31) as process:
        for question, reason in (
            ("error", "ZeroDivisionError: division by zero"),
            ("slow", "it takes more than 0.3 s"),
            ("large", "MemoryError: "),
            ("gone", "exit status 3"),
        ):
            assert process.ask("é\n") == ["é\n", 1]
            with pytest.raises(Ended, match=f"^{reason}$"):
                process.ask(question)
    assert process.process is None
    (tmp_path / "asked.py").write_text("import nothing_of_this_name")
    with pytest.raises(Ended, match="^ModuleNotFoundError: "):
        Apart(str(tmp_path / "asked.py"), "make", 1).ask(1)


def test_regular_expressions_of_files_end():
    assert patterns.match("to_[qk]", "a.to_k", r"(.*\.)?({})$") == {} and patterns.match("to_q", "to_qk", whole=True) is None
    assert patterns.match(r"(?P<n>\d+).*", "12.x") == {"n": "12"}
    name = "transformer_blocks.0." + "a" * 60 + "!"
    for pattern in (
        r".*\.(a+)+$",
        "(a|a)*$x",
        "(x+x+)+y|" + "a?" * 60 + "a" * 60 + "b",
        "(",
        "a{99999999999}",
        "(" * 5000,
        "(?i)a)(",
    ):
        with pytest.raises(InputError, match="is not a regular expression that can be used") as error:
            patterns.match(pattern, name, r"(.*\.)?({})$")
        assert str(error.value).isprintable()
