"""Text → tokens → text: prompts, conversations, padding, and one place for generation settings.

In: examples, prompts or chat messages. Out: token ids as the base wants them, and answers.
"""
