"""Reading pickles without running them: the restricted unpickler, and what it answers."""
