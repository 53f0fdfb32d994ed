"""Checkpoints that a URL names: servers, object stores and the hub. Imported only where there is a URL."""
