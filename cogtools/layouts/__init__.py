"""What the names in a checkpoint mean: tables, no I/O."""
