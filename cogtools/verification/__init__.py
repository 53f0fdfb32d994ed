"""Holding a written LoRA against what it should be: the file itself, its checkpoint, and the libraries that load it."""
