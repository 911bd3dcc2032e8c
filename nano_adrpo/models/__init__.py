"""One architecture a file, hand-written, loading the public safetensors layouts."""
