"""Commands that answer prompts: generate, chat, explain, and two servers."""
