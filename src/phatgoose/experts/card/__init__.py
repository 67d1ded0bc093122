"""The README.md of an expert or a pool: facts collected, then written as Markdown with the Hub's metadata."""
