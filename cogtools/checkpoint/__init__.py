"""What a checkpoint holds: an index of its tensors, and their bytes on request."""
