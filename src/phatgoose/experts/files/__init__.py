"""Readers of single files that strangers wrote: safetensors, torch pickles (without unpickling), tokenizer files.

In: a path. Out: tensors or settings, read within bounds of memory, or a clear error.
"""
