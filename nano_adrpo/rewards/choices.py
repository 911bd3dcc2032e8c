"""Questions with choices, as R1-AQA (Li et al. 2025, arXiv 2503.11197) and Ke-Omni-R ask and reward them: the sentence that
asks, and two rewards of what is answered.

They differ from the published rewards in three ways. What stands in a thought is no answer, and neither is anything where a
thought is not closed; published is the first <answer> anywhere. The form is kept only by one block of each kind; published is
a pattern that several answers one behind the other fit, too. A choice is right where it is the right one's text; published is,
before that, whatever the library math-verify holds to be equal.
"""

import re

from nano_adrpo.errors import InputError
from nano_adrpo.rewards.answers import after_thought

ASKED = "{question} Please choose the answer from the following options: {choices}. "
FORMS = {  # how to answer, by name: R1-AQA's, then Ke-Omni-R's
    "answer": ASKED + "Output the final answer in <answer> </answer>.",
    "think": ASKED + "Output the thinking process in <think> </think> and final answer in <answer> </answer>.",
    "ke-answer": ASKED + "Directly output the final answer in <answer> </answer>.",
    "ke-think": ASKED
    + "Output the thinking process(less than 50 words) in <think> </think> and final answer in <answer> </answer>.",
}
BLOCK = "<{0}>.*?</{0}>"
PLAIN = re.compile(BLOCK.format("answer"), re.DOTALL)
THOUGHT = re.compile(BLOCK.format("think") + r"\s*" + BLOCK.format("answer"), re.DOTALL)


def ask(question, choices, form):
    """The text of a question in one of the FORMS. The choices stand in it as Python writes a list of texts.

    >>> ask("Who?", ["A man", "A dog"], "answer")[:77]
    "Who? Please choose the answer from the following options: ['A man', 'A dog']."
    """
    return FORMS[form].format(question=question, choices=list(choices))


def thinks(form):
    """Whether a form asks for a thought."""
    return "<think>" in FORMS[form]


def chosen(completion):
    """The text in the first <answer> … </answer> of one line behind the thought, or where there is none all that stands there.

    >>> chosen("<think>No <answer>B</answer></think> <answer> A man </answer>"), chosen(" A man\\n"), chosen("<think>A man")
    ('A man', 'A man', '')
    """
    text = after_thought(completion)
    found = re.search("<answer>(.*?)</answer>", text)
    return (found[1] if found else text).strip()


def is_right(completion, answer):
    """1.0 where the text that the completion chose is the answer, letter by letter, else 0.0."""
    return float(chosen(completion) == str(answer).strip())


def choice(completions, problems):
    """The reward of that name. Raises InputError for problems without choices."""
    if not all(problem.choices for problem in problems):
        raise InputError("--reward choice: expected questions with choices, as --task audio reads them")
    return [is_right(text, problem.answer) for text, problem in zip(completions, problems)]


def answer_format(completions, problems):
    """The reward of that name: 1.0 where the whole completion is <answer> … </answer> or, where the problem's form asks for it,
    <think> … </think> and then that."""
    return [keeps_form(text, problem.thinks) for text, problem in zip(completions, problems)]


def keeps_form(completion, thinks=False):
    """
    >>> keeps_form("<answer>A</answer>"), keeps_form("<answer>A</answer><answer>B</answer>")
    (1.0, 0.0)
    >>> keeps_form("<think>so</think>\\n<answer>A</answer>", thinks=True), keeps_form("<answer>A</answer>", thinks=True)
    (1.0, 0.0)
    """
    once = all(completion.count(f"<{end}{tag}>") == 1 for tag in ("think", "answer")[not thinks :] for end in ("", "/"))
    return float(once and bool((THOUGHT if thinks else PLAIN).fullmatch(completion)))
