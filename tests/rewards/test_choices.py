"""Questions with choices: how they are asked, the rewards of what is answered, files of them."""

import json

import pytest
import torch

from nano_adrpo.errors import InputError
from nano_adrpo.files.wav import write_wav
from nano_adrpo.rewards import choices, text
from nano_adrpo.rewards.questions import read_questions
from nano_adrpo.rewards.text import Problem

OPTIONS = ["A dog's bark", "Rain", 'A "hey"']


def test_the_sentences_are_the_published_ones():
    # R1-AQA, src/test_mmau.py; Ke-Omni-R. The list is written as Python writes it.
    asked = """What? Please choose the answer from the following options: ["A dog's bark", 'Rain', 'A "hey"']. """
    think = "in <think> </think> and final answer in <answer> </answer>."
    for form, rest in (
        ("answer", "Output the final answer in <answer> </answer>."),
        ("think", f"Output the thinking process {think}"),
        ("ke-answer", "Directly output the final answer in <answer> </answer>."),
        ("ke-think", f"Output the thinking process(less than 50 words) {think}"),
    ):
        assert choices.ask("What?", OPTIONS, form) == asked + rest and choices.thinks(form) == form.endswith("think")
    assert choices.ask("{choices}", tuple(OPTIONS), "answer").startswith("{choices} Please")


@pytest.mark.parametrize(
    "completion, right",
    [
        ("<answer>Rain</answer>", 1), ("<answer> Rain\t</answer>", 1), ("so <answer>Rain</answer>.", 1), (" Rain\n", 1),
        ("<think>Snow?</think><answer>Rain</answer>", 1), ("<think>Snow</think>\nRain", 1), ("<think>no</think>Rain", 1),
        ("<think><answer>Snow</answer></think><answer>Rain</answer>", 1), ("Snow</think><answer>Rain</answer>", 1),
        ("<answer>Rain</answer><answer>Snow</answer>", 1), ("<answer>Snow</answer><answer>Rain</answer>", 0),
        ("<answer>rain</answer>", 0), ("<answer>Rain.</answer>", 0), ("The rain", 0), ("", 0), ("<answer></answer>Rain", 0),
        ("<think>it is <answer>Rain</answer>", 0), ("<think>Rain", 0), ("<think><answer>Rain</answer></think>", 0),
        ("<think>a</think><think><answer>Rain</answer>", 0), ("<answer>Rain", 0),
    ],
)  # fmt: skip
def test_the_right_choice_is_its_text_behind_the_thought(completion, right):
    assert choices.is_right(completion, "Rain") == choices.is_right(completion, " Rain ") == right


@pytest.mark.parametrize(
    "completion, plain, thought",
    [
        ("<answer>Rain</answer>", 1, 0), ("<answer>a\nb</answer>", 1, 0), ("<answer></answer>", 1, 0),
        (" <answer>Rain</answer>", 0, 0), ("<answer>Rain</answer>\n", 0, 0), ("<answer>Rain", 0, 0), ("Rain", 0, 0), ("", 0, 0),
        ("<answer>a</answer><answer>b</answer>", 0, 0), ("<answer>a</answer> or <answer>b</answer>", 0, 0),
        ("<answer>a<answer>b</answer>", 0, 0), ("<think>a</think><answer>b</answer>", 0, 1),
        ("<think>a\nb</think>\n\n<answer>b</answer>", 0, 1), ("<think></think> <answer>b</answer>", 0, 1),
        ("<think>a</think>so<answer>b</answer>", 0, 0), ("<think>a<answer>b</answer>", 0, 0),
        ("<think>a</think><think>b</think><answer>b</answer>", 0, 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0, 0),
        ("<think>a</think><answer>b</answer>.", 0, 0), ("a</think><answer>b</answer>", 0, 0),
    ],
)  # fmt: skip
def test_the_whole_completion_keeps_the_form(completion, plain, thought):
    assert (choices.keeps_form(completion), choices.keeps_form(completion, thinks=True)) == (plain, thought)


def test_they_are_rewards_with_names_and_weights():
    problems = [Problem("?", "Rain", choices=("Rain", "Snow"), thinks=thinks) for thinks in (False, True)] * 2
    texts = ["<answer>Rain</answer>"] * 2 + ["<answer>Snow</answer>", "<think>x</think><answer>Rain</answer>"]
    given = text.parse(["choice@2", "answer_format@1"])(texts, problems)
    assert given["choice"].tolist() == [1, 1, 0, 1] and given["answer_format"].tolist() == [1, 0, 1, 1]
    assert given["reward"].tolist() == [3, 2, 1, 3]
    assert text.right(texts, problems) == [1, 1, 0, 1] and text.right(["#### 3"], [Problem("1+2=", 3)]) == [1]
    with pytest.raises(InputError, match="--reward choice: expected questions with choices, as --task audio reads them"):
        text.parse(["choice"])(["#### 3"], [Problem("1+2=", 3)])


# ------------------------------------------------------------------------------------------------------------------- files

OWN = {"question": "What is it?", "choices": OPTIONS, "answer": "Rain", "audio": "sounds/a.wav"}
AVQA = {
    "id": 1, "video_name": "-HG3Omg_89c_000030", "video_id": 2, "question_text": "What is in the video?",
    "multi_choice": OPTIONS, "answer": 1, "question_relation": "Both", "question_type": "Happening",
}  # fmt: skip
R1 = {**AVQA, "dataset_name": "AVQA", "audio_path": "sounds/a.wav"}


@pytest.fixture
def write(tmp_path):
    (tmp_path / "sounds").mkdir()
    for name in ("sounds/a", "a", "sounds/-HG3Omg_89c_000030", "-HG3Omg_89c_000030"):
        write_wav(tmp_path / f"{name}.wav", torch.zeros(800))

    def written(*rows, name="q.jsonl"):
        (tmp_path / name).write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    return written


def test_three_formats_are_read(tmp_path, write):
    asked, heard = choices.ask("What is it?", OPTIONS, "answer"), choices.ask("What is in the audio?", OPTIONS, "answer")
    listed = write(json.dumps([AVQA, AVQA]), name="train_qa.json")
    far = {**R1, "audio_path": "/nowhere/a.wav"}
    for file, folder, question, row, sound in (
        (write(OWN), None, asked, OWN, "sounds/a.wav"),
        (write(OWN, name="a"), tmp_path / "sounds" / "..", asked, OWN, "sounds/../sounds/a.wav"),
        (write({**OWN, "audio_id": "./a.wav"}, name="b"), None, asked, {**OWN, "audio_id": "./a.wav"}, "a.wav"),  # as in MMAU
        (listed, None, heard, AVQA, "-HG3Omg_89c_000030.wav"),
        (listed, tmp_path / "sounds", heard, AVQA, "sounds/-HG3Omg_89c_000030.wav"),
        (write(R1, name="c"), None, heard, R1, "sounds/a.wav"),
        (write(far, name="d"), tmp_path, heard, far, "a.wav"),
    ):
        problem, *more = read_questions(file, audio_folder=folder)
        assert problem == Problem(question, "Rain", row, "", tuple(OPTIONS), str(tmp_path / sound), False)
        assert len(more) == (file == listed)
    (problem,) = read_questions(write(OWN), " Be brief.", "A shot.\n", "think")
    assert problem.question == choices.ask("What is it?", OPTIONS, "think") + " Be brief." and problem.thinks
    assert problem.prompt == ("A shot.\n" + problem.question, str(tmp_path / "sounds/a.wav"))


def test_a_choice_may_stand_twice_and_blanks_do_not_count(write):
    # Both are in MMAU: 27 questions have a choice twice, 4 an answer with blanks around it.
    (problem,) = read_questions(write({**OWN, "choices": ["Rain", " Rain", "Snow"], "answer": "Rain "}))
    assert problem.answer == "Rain" and "[' Rain'" not in problem.question and "'Rain', ' Rain', 'Snow'" in problem.question


def test_a_bad_file_is_named_with_its_line(tmp_path, write):
    (tmp_path / "a.mp3.wav").write_bytes(b"ID3" + bytes(100))
    without = [{key: value for key, value in OWN.items() if key != name} for name in OWN]
    expected = ".; expected 'question', 'choices', 'answer' and 'audio', or AVQA's"
    for row, message in (
        *((row, f"key '{name}' is missing{expected[1:]}") for name, row in zip(OWN, without)),
        ({**OWN, "question": " "}, "key 'question' is ' '; expected a text"),
        ({**OWN, "choices": ["a"]}, "key 'choices' is .'a'.; expected a list of two texts or more"),
        ({**OWN, "choices": ["Rain", 2]}, "key 'choices' is"), ({**OWN, "choices": "Rain"}, "key 'choices' is 'Rain'"),
        ({**OWN, "choices": ["Rain", ""]}, "key 'choices' is"), ({**OWN, "answer": 1}, "key 'answer' is 1; expected a text"),
        ({**OWN, "answer": "rain"}, "key 'answer' is 'rain'; expected one of 'choices', "),
        ({**OWN, "answer": "x\ny" * 99}, r"key 'answer' is 'x\\nyx.*… .*; expected one of"),
        ({**OWN, "audio": "b\n.wav"}, r"no such file: '.*/b\\n.wav'; expected a sound there"),
        ({**OWN, "audio": "b" * 9999}, "no such file: '"), ({**OWN, "audio": "b\0.wav"}, "no such file: '"),
        ({**OWN, "audio": "a.mp3.wav"}, ".*a.mp3.wav: an MP3 file; expected PCM in WAV, as `ffmpeg"),
        ({**AVQA, "answer": 3}, "key 'answer' is 3; expected a place in 'multi_choice', 0 … 2"),
        ({**AVQA, "answer": -1}, "key 'answer' is -1"), ({**AVQA, "answer": True}, "key 'answer' is True"),
        ({**AVQA, "answer": "1"}, "key 'answer' is '1'"), ({**AVQA, "video_name": None}, "key 'video_name' is None"),
        ({**AVQA, "video_name": "b"}, "no such file: '.*/b.wav'"), ({**R1, "audio_path": 3}, "key 'audio_path' is 3"),
        ("[1]\n", "expected a JSON object"), ('{"question": "a"', "not valid JSON"), ("3\n", "expected a JSON object"),
    ):  # fmt: skip
        file = write(OWN, "\n", row)
        with pytest.raises(InputError, match=f"^{file}, line 3: {message}") as error:
            read_questions(file)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
    for content, message in (
        ("", ": no questions; expected a JSON object on every line"), ("[]", ": no questions"), ("[1]", ", item 1: expected a"),
        ("[{]", ": not valid JSON"), (json.dumps([AVQA, {**AVQA, "answer": 9}]), ", item 2: key 'answer' is 9; expected"),
    ):  # fmt: skip
        file = write(content)
        with pytest.raises(InputError, match=f"^{file}{message}"):
            read_questions(file)
    with pytest.raises(FileNotFoundError, match="absent.jsonl: no such file"):
        read_questions(tmp_path / "absent.jsonl")
