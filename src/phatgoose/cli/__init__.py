"""The command line: one file for each command.

In: options and arguments. Out: text on standard output, notes on standard error, exit codes (`main.py`). A
command imports what is slow (torch) inside its function, so that `--help` stays quick. A new command is a file in
one of the rooms and a line in `main.py`; then run `python docs/generate/cli.py`.
"""
