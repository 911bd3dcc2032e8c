"""The embedded default: real data, tiny checkpoints in the public layouts, and the recipes that made them."""
