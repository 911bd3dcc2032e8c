"""What test_distributed.py starts with torchrun: several runs, one after the other, on the same ranks.

torchrun --nproc-per-node 2 tests/ranks.py CASES.json        # [[script, [its options]], …]
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_flow
import train_grpo
from nano_adrpo.evaluation import plots
from nano_adrpo.training import distributed

if __name__ == "__main__":
    torch.set_num_threads(1)
    plots.pyplot = lambda file: None
    with distributed.together():
        for script, words in json.loads(Path(sys.argv[1]).read_text()):
            {"flow": train_flow, "grpo": train_grpo}[script].main(words)
