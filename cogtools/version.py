"""The version of cogtools."""

__version__ = "0.1.0"
