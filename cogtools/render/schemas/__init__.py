"""JSON Schemas of what `--json` prints: one per command, and `error.json` for what all print on failure."""
