"""A checkpoint → a `Base`: model, tokenizer and fingerprint.

In: a folder, a Hub id or a GGUF file. Out: a `Base`, or a `BaseModelError` that says what to do.
A new file format is read in a file of its own, as `gguf.py` does, and called from `load.py`.
"""

DTYPES = ("float32", "bfloat16", "float16")
"""What a base can be loaded in, beside its checkpoint's own dtype."""
