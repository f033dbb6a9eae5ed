"""A file a command. `NAME.py` has `Arguments` (a dataclass: its fields are the options, its docstring is the help) and
`run(arguments)`, and loads torch only inside `run`, so that `--help` is fast. A command whose defaults depend on other
options also has `default_for(arguments)`, which takes the words of the command line.

COMMANDS in `nsa.cli` lists them.
"""
