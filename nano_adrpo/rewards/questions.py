"""Files of questions about sounds, each with choices and the path of a WAV file."""

import os
from pathlib import Path

from nano_adrpo import files
from nano_adrpo.errors import InputError, MissingFile, about, shown
from nano_adrpo.files import wav
from nano_adrpo.rewards import choices
from nano_adrpo.rewards.text import Problem


def read_questions(file, instruction="", few_shot="", form="answer", audio_folder=None):
    """The questions in a file -> [rewards.text.Problem], in one of three formats. The first is this project's; the others are
    AVQA's (Yang et al. 2022), in which "video" becomes "audio" as in R1-AQA:

      JSON lines      question, choices (texts), answer (one of them), audio (path; MMAU calls it audio_id)
      train_qa.json   a list of objects: question_text, multi_choice (texts), answer (a place among them, from 0), video_name;
                      the sound is VIDEO_NAME.wav
      R1-AQA's        JSON lines with the same keys, and audio_path

    instruction   put behind every question
    few_shot      put before it, as the policy reads it
    form          how to answer, a name in choices.FORMS
    audio_folder  where the sounds are; None: paths start from the folder that `file` is in. With it, the last part counts of an
                  audio_path, since that is a path of whoever wrote the file

    A choice may stand twice, as in MMAU: its text is what counts. Raises InputError naming file and line (or item of a list)
    for a row that does not fit or a sound that wav.samples refuses, so that nothing fails later than here.
    """
    if files.read_text(file).lstrip()[:1] == "[":
        rows = enumerate(files.parse_json(files.read_text(file), file, list), 1)
        rows = [(f"{file}, item {number}", row) for number, row in rows]
    else:
        rows = [(f"{file}, line {number}", row) for number, row in files.read_json_lines(file)]
    if not rows:
        raise InputError(f"{file}: no questions; expected a JSON object on every line, or a list of them")
    problems = []
    for where, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected a JSON object")
        fields = read_avqa(row, where, audio_folder) if "question_text" in row else read_own(row, where)
        question, options, answer, audio = fields
        audio = str(Path(audio_folder or Path(file).parent) / audio)
        if not os.path.isfile(audio):  # not Path's: a name can be too long to ask for
            raise MissingFile(f"{where}: no such file: {shown(repr(audio), 150)}; expected a sound there")
        with about(where):
            wav.samples(audio)
        text = choices.ask(question, options, form) + instruction
        problems.append(Problem(text, answer.strip(), row, few_shot, tuple(options), audio, choices.thinks(form)))
    return problems


def read_own(row, where):
    """-> question, choices, answer, audio of a row in this project's format."""
    question, audio = text_of(row, "question", where), text_of(row, "audio_id" if "audio_id" in row else "audio", where)
    options, answer = options_of(row, "choices", where), text_of(row, "answer", where)
    if answer.strip() not in [option.strip() for option in options]:
        raise wrong(row, "answer", where, f"one of 'choices', {shown(repr(options), 80)}")
    return question, options, answer, audio


def read_avqa(row, where, audio_folder):
    """-> question, choices, answer, audio of a row of AVQA or R1-AQA."""
    question, options, place = text_of(row, "question_text", where), options_of(row, "multi_choice", where), row.get("answer")
    if type(place) is not int or not 0 <= place < len(options):
        raise wrong(row, "answer", where, f"a place in 'multi_choice', 0 … {len(options) - 1}")
    if "audio_path" in row:
        audio = text_of(row, "audio_path", where)
        audio = Path(audio).name if audio_folder else audio
    else:
        audio = text_of(row, "video_name", where) + ".wav"
    return question.replace("video", "audio"), options, options[place], audio


def text_of(row, key, where):
    """The text under a key of a row, not empty."""
    if not isinstance(value := row.get(key), str) or not value.strip():
        raise wrong(row, key, where, "a text")
    return value


def options_of(row, key, where):
    """The texts under a key of a row, two or more, none of them empty."""
    value = row.get(key)
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(each, str) and each.strip() for each in value):
        raise wrong(row, key, where, "a list of two texts or more")
    return value


def wrong(row, key, where, expected):
    """The InputError for a value that is not as expected, or is missing."""
    if key in row:
        return InputError(f"{where}: key '{key}' is {shown(repr(row[key]), 80)}; expected {expected}")
    own, avqa = "'question', 'choices', 'answer' and 'audio'", "AVQA's 'question_text', 'multi_choice', 'answer', 'video_name'"
    return InputError(f"{where}: key '{key}' is missing; expected {own}, or {avqa}")
