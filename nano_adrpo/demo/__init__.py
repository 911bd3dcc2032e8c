"""The embedded default of scripts and commands: real data and tiny checkpoints in the public layouts, as plain paths.

The judges and the deceptive reward are loaded like a user's own functions, as FILE.py:FUNCTION.
"""

from pathlib import Path

HERE = Path(__file__).resolve().parent

FLOW = {  # coloured handwritten digits, see digits.py
    "model": str(HERE / "base"),
    "prompts": str(HERE / "prompts.jsonl"),
    "held_out": str(HERE / "held_out.jsonl"),
    "reward": [str(HERE / "clip")],
    "auxiliary": f"{HERE / 'digits.py'}:tints@0",  # a reward that only measures, for gardo-gate
    "judge": f"{HERE / 'digits.py'}:judge",
}
GRPO = {  # additions of two numbers, see arithmetic.py
    "model": str(HERE / "arithmetic_base"),
    "problems": str(HERE / "arithmetic_data" / "train.jsonl"),
    "held_out": str(HERE / "arithmetic_data" / "held_out.jsonl"),
    "judge": f"{HERE / 'arithmetic.py'}:judge",
    "max_new_tokens": 22,  # the longest answer with its end: a limit below it cuts right answers off and pays nothing for them
}
DECEPTIVE = {  # the same additions, in which a guess pays a little
    "model": str(HERE / "arithmetic_deceptive"),
    "reward": [f"{HERE / 'arithmetic.py'}:deceptive"],
}
AUDIO = {  # questions about synthesised sounds, see sounds.py
    "problems": str(HERE / "sounds_data" / "train.jsonl"),
    "held_out": str(HERE / "sounds_data" / "held_out.jsonl"),
    "judge": f"{HERE / 'sounds.py'}:judge",
    "options": {  # what train_grpo.py has by default with --demo audio
        "task": "audio",
        "model": str(HERE / "sounds_base"),
        "prompt_form": "think",
        "max_new_tokens": 24,
        "group_size": 8,
        "rounds": 40,
        "lr": 8e-4,
        "eval_every": 20,
        "eval_samples": 4,
    },
}
