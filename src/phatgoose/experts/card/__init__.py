"""The model card (README.md) of an expert or a pool.

In: an expert's config and records. Out: Markdown with the Hub's metadata. A new row of the card's table: `Facts.rows`.
"""
