"""Commands that answer prompts: generate, chat, explain, and two servers (serve, ui).

In: a base, and a pool with a router. Out: text, or a port that answers.
"""
