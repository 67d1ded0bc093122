"""What several commands share: options, loading a base and a pool, streaming text.

Options that belong together are a frozen dataclass in `options.py`, which `expand_options` expands into typer's
parameters.
"""
