"""One thread: the tests' models are tiny, and what a test prints does not depend on the number of cores."""

import torch

torch.set_num_threads(1)
