"""What both training scripts do around the algorithm: options, the run folder and its log, the optimizer step."""
