"""Rewards by name: weighted sums, batches, devices, a user's own function, and what is refused."""

import shutil
import traceback

import pytest
import torch
from torch import nn

from nano_adrpo.errors import InputError, NotFinite
from nano_adrpo.rewards import Rewards, function, named

TEXTS, PROMPTS = ["a", "bb", "ccc", "dddd"], ["one", "two", "three", "four"]
MODELS = {"length": lambda folder: lambda texts, prompts: [float(len(text)) for text in texts]}


def own(path, body, signature="f(texts, prompts)"):
    file = path / "mine.py"
    file.write_text(f"import numpy as np\ndef {signature}:\n    {body}\n")
    return str(file)


def rewards(*specs, plain=None):
    return Rewards(named(specs, MODELS, plain))


def test_a_weighted_sum_and_its_terms(tmp_path):
    file = own(tmp_path, "return [prompt == 'two' for prompt in prompts]")
    specs = f"length:{tmp_path}@-0.5", f"{file}:f@2e1", "zero"
    reward = rewards(*specs, plain={"zero": lambda: lambda texts, prompts: [0] * len(prompts)})
    for batch in (None, 1, 3):
        scores = {name: numbers.tolist() for name, numbers in reward(TEXTS, PROMPTS, batch).items()}
        assert scores == {"reward": [-0.5, 19, -1.5, -2], "length": [1, 2, 3, 4], "f": [0, 1, 0, 0], "zero": [0] * 4}
    assert list(scores) == ["reward", "length", "f", "zero"]
    alone = rewards(f"{file}:f@3")(TEXTS, PROMPTS)  # one reward alone has no terms
    assert list(alone) == ["reward"] and alone["reward"].tolist() == [0, 3, 0, 0]


def test_batches_are_as_long_as_asked():
    seen = []
    reward = Rewards({"f": (lambda texts, prompts: seen.append((texts, prompts)) or [0.0] * len(texts), 1.0)})
    reward(TEXTS, PROMPTS, batch=3)
    assert seen == [(TEXTS[:3], PROMPTS[:3]), (TEXTS[3:], PROMPTS[3:])]


def test_embeddings_are_those_of_the_first_that_makes_some():
    class Embedder:
        def __init__(self, factor):
            self.factor, self.batches = factor, []

        def __call__(self, images, prompts):
            return [0.0] * len(images)

        def embed_images(self, images):
            self.batches.append(len(images))
            return self.factor * images.flatten(1)

    images, first, second = torch.arange(15.0).reshape(5, 3, 1, 1), Embedder(2), Embedder(3)
    reward = Rewards({"none": (lambda *_: None, 1.0), "first": (first, 0.0), "second": (second, 1.0)})
    assert torch.equal(reward.embed_images(images, batch=2), 2 * images.flatten(1)) and first.batches == [2, 2, 1]
    assert Rewards({"none": (lambda *_: None, 1.0)}).embed_images(images) is None


class Movable(nn.Module):
    def __init__(self):
        super().__init__()
        self.places = []

    def _apply(self, move, recurse=True):
        self.places.append(move(torch.empty(0)).device.type)
        return self

    def forward(self, images, prompts):
        return torch.zeros(len(prompts))


def test_models_come_back_to_the_cpu_whatever_happens():
    movable = Movable()
    reward = Rewards({"movable": (movable, 1.0), "function": (lambda images, prompts: [0.0] * len(prompts), 1.0)})
    with reward.on("meta") as there:
        assert there is reward and movable.places == ["meta"]
    with pytest.raises(KeyError), reward.on("meta"):
        raise KeyError
    assert movable.places == ["meta", "cpu"] * 2


def test_numbers_of_any_kind_are_read(tmp_path):
    for numbers in ("np.arange(4.0)[::-1]", "(3, 2, 1, 0)", "range(3, -1, -1)", "[np.float32(x) for x in (3, 2, 1, 0)]"):
        file = own(tmp_path, f"return {numbers}")
        assert rewards(f"{file}:f")(TEXTS, PROMPTS)["reward"].tolist() == [3, 2, 1, 0]


def test_other_than_a_number_a_sample_is_refused(tmp_path):
    for body, message in (
        ("return [1.0]", r"f gave rewards of shape \[1\]; expected \[4\], one a sample"),
        ("return 1.0", r"f gave rewards of shape \[\]; expected \[4\]"),
        ("return [[1, 2]] * 4", r"f gave rewards of shape \[4, 2\]; expected \[4\]"),
        ("return None", r"f gave NoneType; expected \[4\] numbers"),
        ("return prompts", r"f gave list; expected \[4\] numbers"),
        ("return [[1], [1, 2], [1], [1]]", r"f gave list; expected \[4\] numbers"),
        ("return [10**400] * 4", r"f gave list; expected \[4\] numbers"),
        ("return [1j] * 4", r"f gave complex numbers; expected \[4\] real ones"),
        ("return np.ones(4) * 1j", r"f gave complex numbers; expected \[4\] real ones"),
    ):
        with pytest.raises(InputError, match=message) as error:
            rewards(f"{own(tmp_path, body)}:f")(TEXTS, PROMPTS)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="1 samples and 4 prompts; expected a prompt for each sample"):
        rewards(str(tmp_path))(TEXTS[:1], PROMPTS)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_number_that_is_not_finite_names_reward_and_prompt(tmp_path, value):
    file = own(tmp_path, f"return [0, float('{value}'), 0, float('nan')]")
    reward = rewards(str(tmp_path), f"{file}:f")
    with pytest.raises(NotFinite, match=r"a reward of the prompt 'two' is not finite \(f\)"):
        reward(TEXTS, PROMPTS)


def test_what_a_users_code_raises_keeps_its_traceback(tmp_path):
    reward = rewards(f"{own(tmp_path, 'return 1 / 0')}:f")
    with pytest.raises(ZeroDivisionError) as error:
        reward(TEXTS, PROMPTS)
    assert error.traceback[-1].path.name == "mine.py" and error.traceback[-1].lineno == 2  # counted from 0
    with pytest.raises(NameError):
        function(f"{own(tmp_path, 'pass', 'f(x=y)')}:f")
    # A file of its own that is missing, or a server that does not answer, is no wrong option of ours.
    for raised in ("open('no-such-table')", "raise TimeoutError('no answer')"):
        with pytest.raises(RuntimeError, match=r"mine\.py:f: .*(no-such-table|no answer)") as error:
            rewards(f"{own(tmp_path, raised)}:f")(TEXTS, PROMPTS)
        assert traceback.extract_tb(error.value.__cause__.__traceback__)[-1].filename == str(tmp_path / "mine.py")


def test_a_users_function_gets_copies(tmp_path):
    def rows():
        return [{"answer": [1]} for _ in range(4)]

    body = "images.zero_(); prompts.clear(); rows[0]['answer'].append(2); return [0.0] * 4"
    file = own(tmp_path, body, "f(images, prompts, rows)")
    images, prompts, kept = torch.ones(4, 3, 2, 2), list(PROMPTS), rows()
    assert function(f"{file}:f")(images, prompts, rows=kept) == [0.0] * 4
    assert images.eq(1).all() and prompts == PROMPTS and kept == rows()
    file = own(tmp_path, "images.zero_(); return [0.0] * len(prompts)", "f(images, prompts)")
    rewards(f"{file}:f")(images, PROMPTS, batch=3)
    with torch.inference_mode():
        inferred = torch.ones(4, 3, 2, 2)
    rewards(f"{file}:f")(inferred, PROMPTS)
    assert images.eq(1).all() and inferred.eq(1).all()


@pytest.mark.parametrize("code", ["", "0", "1", "'done'"])
def test_sys_exit_in_a_users_code_is_an_error(tmp_path, code):
    file = own(tmp_path, f"import sys; sys.exit({code})")
    with pytest.raises(RuntimeError, match=r"mine\.py:f called sys\.exit\(") as error:
        rewards(f"{file}:f")(TEXTS, PROMPTS)
    frames = traceback.extract_tb(error.value.__cause__.__traceback__)
    assert (frames[-1].filename, frames[-1].lineno) == (file, 3)  # where, in the user's file
    (tmp_path / "mine.py").write_text(f"import sys\nsys.exit({code})\n")
    with pytest.raises(RuntimeError, match=r"mine\.py called sys\.exit\("):
        function(f"{file}:f")


EXPECTED = "expected one of zero, length:FOLDER, FILE.py:FUNCTION, a length folder"


def test_a_wrong_reward_is_named(tmp_path):
    file = own(tmp_path, "return [0.0] * len(texts)\nnumber = 3\nreward = length = f")
    folder = shutil.copytree(tmp_path, tmp_path / "folder")
    for specs, message in (
        (["lenght:FOLDER"], f"reward 'lenght:.*': no such reward or folder; {EXPECTED}"),
        (["no-such-folder"], f"reward 'no-such-folder': no such reward or folder; {EXPECTED}"),
        (["length"], f"reward 'length': no such reward or folder; {EXPECTED}"),
        (["length:"], f"reward 'length:': no such reward or folder; {EXPECTED}"),
        (["FOLDER@half"], f"reward '{folder}@half': no such reward or folder"),
        (["length:FOLDER@inf"], "reward '.*@inf': the weight is inf; expected a finite number"),
        (["zero@nan"], "reward 'zero@nan': the weight is nan; expected a finite number"),
        (["nowhere.py:bright"], "nowhere.py: no such file; expected one with the function 'bright'"),
        (["FILE:dark"], f"{file}: no function 'dark' in it"),
        (["FILE:"], f"{file}: no function '' in it"),
        (["FILE:number"], f"{file}: no function 'number' in it"),
        (["FOLDER", "length:FOLDER@2"], f"reward 'length:{folder}@2': length is named twice"),
        (["FOLDER", "FILE:length"], f"reward '{file}:length': length is named twice"),
        (["FOLDER", "FILE:reward"], f"reward '{file}:reward': reward is what the sum is called"),
    ):
        specs = [spec.replace("FOLDER", str(folder)).replace("FILE", file) for spec in specs]
        with pytest.raises(InputError, match=message) as error:
            rewards(*specs, plain={"zero": None})
        assert "\n" not in str(error.value)
    assert rewards(f"{file}:reward")(TEXTS, PROMPTS)["reward"].tolist() == [0] * 4  # alone it is the sum
