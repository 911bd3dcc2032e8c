"""Text in and out of a decoder: chat templates and tokenizers, sampling, rollouts."""
