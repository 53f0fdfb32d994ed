"""The file formats of checkpoints: headers, directories, and how files begin."""
