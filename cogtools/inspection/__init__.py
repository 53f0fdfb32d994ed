"""What a checkpoint is: found out from its index, or from its weights where statistics are asked for."""
