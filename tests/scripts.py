"""What the tests of both training scripts share: a run, what it left, and the line of a refusal."""

import json

import pytest

from nano_adrpo.errors import run_command


def lines(out):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def written(out):
    """{relative path: bytes} of all files of a run but config.json and checkpoints/, which repeat the options."""
    files = (
        path for path in out.rglob("*") if path.is_file() and path.name != "config.json" and path.parts[-3] != "checkpoints"
    )
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def refused(capsys, call):
    """The one line on stderr of a call that must end with status 2."""
    with pytest.raises(SystemExit) as stop:
        run_command(call)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    return line
