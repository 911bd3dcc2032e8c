"""training/options.py: types of options, and a config file that the command line overrides."""

import argparse
import json

import pytest
from scripts import refused

from nano_adrpo.errors import InputError, Parser
from nano_adrpo.training import options


def parser():
    parser = Parser("test")
    options.optimisation(parser, ("to_q",), rounds=5, lr=0.1, lr_schedule="constant")
    add = options.run(parser, eval_every=2)
    add("--words", nargs="+")
    add("--low", type=options.finite)
    return parser


def test_a_config_gives_the_options_that_the_command_line_does_not(tmp_path):
    given = ["--rounds", "7", "--low", "-8", "--words", "a", "b", "--keep-checkpoints", "--no-eval-first", "--seed", "3"]
    first = options.parse(parser(), given)
    (tmp_path / "config.json").write_text(json.dumps(options.saved(first)))
    config = ["--config", str(tmp_path / "config.json")]
    assert options.saved(options.parse(parser(), config)) == options.saved(first)
    changed = options.parse(parser(), [*config, "--rounds", "1", "--words", "c", "--eval-first", "--no-keep-checkpoints"])
    assert (changed.rounds, changed.words, changed.low, changed.eval_first, changed.keep_checkpoints) == (
        1,
        ["c"],
        -8,
        True,
        False,
    )
    (tmp_path / "config.json").write_text('{"device": "no-such-device", "rounds": 2}')  # another machine's
    assert options.parse(parser(), [*config, "--device", "cpu"]).rounds == 2


def test_a_bad_config_is_refused(tmp_path, capsys):
    file = tmp_path / "config.json"
    for content, message in (
        ('{"rounds": 1, "bogus": 2}', f"{file}: key 'bogus' is no option of this script"),
        ('{"config": "x"}', f"{file}: key 'config' is no option of this script"),
        ("[1]", f"{file}: expected a JSON object"),
        ('{"rounds": ', f"{file}: not valid JSON"),
        ('{"rounds": -1}', f"{file}: key 'rounds' is -1: -1 is not a positive number or 0"),
        ('{"rounds": true}', f"{file}: key 'rounds' is True; expected a number or a text"),
        ('{"rounds": [3, 4]}', f"{file}: key 'rounds' is [3, 4]; expected a number or a text"),
        ('{"rounds": {"a": 1}}', f"{file}: key 'rounds' is {{'a': 1}}; expected a number or a text"),
        ('{"rounds": "fast"}', f"{file}: key 'rounds' is 'fast': expected a number"),
        ('{"words": ["a", ["b"]]}', f"{file}: key 'words' is ['a', ['b']]; expected a number or a text, or a list of them"),
        ('{"words": ["a\\u0000"]}', f"{file}: key 'words' is ['a\\x00']; expected a number or a text"),
        ('{"eval_first": "false"}', f"{file}: key 'eval_first' is 'false'; expected true or false"),
    ):
        file.write_text(content)
        assert message in refused(capsys, lambda: options.parse(parser(), ["--config", str(file)]))
    assert "nowhere.json: no such file" in refused(capsys, lambda: options.parse(parser(), ["--config", "nowhere.json"]))


def test_a_run_goes_on_with_its_own_options(tmp_path, capsys):
    first = options.saved(options.parse(parser(), ["--rounds", "7", "--low", "-8", "--words", "a", "b"]))
    again = ["--resume", "--out", str(tmp_path)]
    assert options.parse(parser(), [*again, "--seed", "3"]).rounds == 5  # no run there yet
    (tmp_path / "config.json").write_text(json.dumps(first))
    (tmp_path / "other.json").write_text('{"rounds": 8, "seed": 4}')
    assert options.saved(options.parse(parser(), again)) == first
    given = options.parse(parser(), [*again, "--config", str(tmp_path / "other.json"), "--seed", "3"])
    assert (given.rounds, given.seed, given.low) == (8, 3, -8)  # the run's, the file's, the command line's: the last one counts
    assert "--resume: expected with --out" in refused(capsys, lambda: options.parse(parser(), ["--resume"]))


def test_the_types_of_options():
    for kind, good, bad in (
        (options.positive(int), {"3": 3}, ("0", "-1", "1.5")),
        (options.positive(int), {str(2**31 - 1): 2**31 - 1}, (str(2**31), "9" * 400)),
        (options.positive(float, zero=True), {"0": 0.0, "2.5": 2.5}, ("-1", "nan", "inf")),
        (options.finite, {"-2": -2.0}, ("inf", "x")),
        (options.fraction, {"0": 0.0, "0.9": 0.9}, ("1", "-0.1")),
        (options.seed, {str(2**64 - 1): 2**64 - 1, "-5": -5}, (str(2**64), "x")),
        (options.device, {"cpu": "cpu"}, ("tpu9", "meta", "hpu")),
    ):
        assert {text: kind(text) for text in good} == good
        for text in bad:
            with pytest.raises((argparse.ArgumentTypeError, ValueError)):
                kind(text)


@pytest.mark.parametrize("text", ["-1", "-.5", "-4e-2", "-1E+3", "-2.e1"])
def test_a_negative_number_is_no_option(text):
    parser = Parser("")
    parser.add_argument_group("numbers").add_argument("--low", type=options.finite)
    assert parser.parse_args(["--low", text]).low == float(text)


def test_an_empty_text_is_no_choice(capsys):
    parser = Parser("")
    parser.add_argument("--file"), parser.add_argument("--words", nargs="+"), parser.add_argument("--system", metavar="TEXT")
    assert parser.parse_args(["--system", ""]).system == ""
    for words, name in ((["--file", ""], "--file"), (["--file="], "--file"), (["--words", "a", ""], "--words")):
        assert f"error: {name}: expected a text that is not empty" in refused(capsys, lambda: parser.parse_args(words))


def test_sizes_and_ranges_are_checked():
    options.divides("--x", 4, 16, "samples")
    with pytest.raises(InputError, match="--x 5 does not divide the 16 samples"):
        options.divides("--x", 5, 16, "samples")
    with pytest.raises(InputError, match=r"--a-min and --a-max: the advantage's range is \[2, 1\]"):
        options.check_range(2, 1)


def test_an_option_without_effect_is_refused_on_the_command_line_alone(tmp_path):
    rules = (False, "with --x", "--low"), (True, "with --y", "--words")
    options.refuse_idle(["--words", "a", "--lower", "1"], *rules)
    for words in (["--low", "1"], ["--rounds", "2", "--low=1"]):
        with pytest.raises(InputError, match="^--low: expected only with --x$"):
            options.refuse_idle(words, *rules)
