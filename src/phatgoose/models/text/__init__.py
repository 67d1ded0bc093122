"""Text → tokens → text: prompts, conversations, padding, and generation settings.

In: examples, prompts or chat messages. Out: token ids as the base needs them, batches, and answers.

`encoding.py` encodes; `decoding.py` decodes token by token; `conversation.py` renders chat templates; `batch.py` pads
and computes targets' logits; `capabilities.py` knows what an architecture allows (add a new architecture's peculiarity
there); `generate.py` has the one set of generation settings.
"""
