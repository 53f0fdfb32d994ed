"""The commands that write: one checkpoint or many at once."""
