"""The conversion core: what a checkpoint means, what it becomes, and how that is written."""
