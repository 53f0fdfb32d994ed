"""How much is read of a file before anything is known of it.

Each limit is many times what the largest real checkpoints have: CogVideoX-5B with its text encoder and VAE, every
weight stored twice, 26 GB. Together they bound the memory that the smallest and cleverest file can make a command take.
"""

from __future__ import annotations

# How the parts that say what is there may be long

MAX_PICKLE_BYTES = 32 << 20
"""A pickle, unpacked; those of a legacy file together. Real: 0.5 MB. A deflated one could unpack to anything."""

MAX_DIRECTORY_BYTES = 8 << 20
"""The directory of a zip archive. Real: 0.3 MB."""

MAX_HEADER_BYTES = 8 << 20
"""The header of a safetensors file without its metadata, and how much of its metadata is kept. Real: 0.2 MB; some
trainers add notes on their data, of 2 MB or even 40 MB."""

MAX_TENSORS = 100_000
"""The tensors of a file, and the other entries of its state dict. Real: 3,000."""

MAX_INDEX_BYTES = 8 << 20
"""An index of shards. Real: 0.1 MB for 1,500 tensors."""

MAX_LATEST_BYTES = 1024
"""The file `latest`, which holds the name of a folder. Real: 4."""

MAX_TRAINING_CONFIG_BYTES = 128 << 10
"""training_config.yaml: PyYAML takes its time. Real: 8 kB."""

MAX_ADAPTER_CONFIG_BYTES = 1 << 20
"""adapter_config.json. Real: 1 kB, or some hundred for lists of full paths."""

# What a pickle may ask for: a few bytes can ask for very much

MAX_INSTRUCTIONS = 1_000_000
"""The longest program that is carried out. Real: 0.2 million."""

SHORT_INSTRUCTIONS = 1000
"""The same for a pickle that says very little: a version, one storage's key and length. Real: 20."""

MAX_COPIED_ITEMS = 1_000_000
"""How many items all calls together may copy: a few bytes can ask for a long list to be copied again and again."""

MAX_NAMES = 10_000
"""How many different names, other than those of tensors, it may mention. Real: some dozens."""

MAX_INTEGER_BYTES = 1024
"""The longest integer. Python refuses to print one much longer than this."""

MAX_TUPLE_KEY_ITEMS = 1000
"""The largest tuple, nested ones counted in full, that may be a dict's key: hashing visits every item."""

MAX_CHOSEN_KEY_ITEMS = 30_000
"""How many very large integers, and items of tuples, may be keys. A file can choose their hashes, and a dict of keys
with one hash takes quadratic time. Strings are hashed with a secret; smaller integers have hashes of their own."""

# What a tensor may be

MAX_DIMENSIONS = 32
"""NumPy 1 has no more; PyTorch has 64, and no weights have more than 6."""

MAX_TENSOR_BYTES = 2**63
"""PyTorch and NumPy count elements and bytes in signed 64-bit integers."""
