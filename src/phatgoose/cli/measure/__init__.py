"""Commands that measure: evaluate, run experiments and write reports."""
