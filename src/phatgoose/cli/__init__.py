"""The command line: one file for each command.

In: options and arguments. Out: text on standard output, notes on standard error, exit codes (`main.py`). Any
`PhatgooseError` is a refusal that ends a command, so docstrings here don't list what is raised. A command imports
what is slow (torch) inside its function, so that `--help` stays quick; public names it takes from `phatgoose`, which
imports them on first use. A new command is a file in one of the rooms and a line in `main.py`; then run
`python docs/generate/cli.py`.
"""
