"""Readers of strangers' files: safetensors, torch files (nothing is run), tokenizer files.

In: a path or a `SafeFolder`. Out: tensors or settings, read within bounds of memory, or an error that names the file.
"""
