"""The command `stageflow`: click commands over `Client` and the journal. It decides nothing itself.

==============  ===============================================================================
`main`          the entry point: finds the command, turns errors into one line and an exit code
`commands`      the commands, one file each
`options`       options that several commands share
`log_options`   the logging of `run` and `up`; `stop_signals` the signals that stop them
`selection`     the instances that a command acts on; `bulk` acts on many of them
`letters`       the dead letters that a command acts on
`output`        rows as a table, JSON or CSV; `message_rows` makes rows of messages
`progress`      the progress of a run on stderr
`importer`      imports MODULE:NAME
`input_file`    the input of `run`; `inputs` reads its formats, `csv_values` converts cells
`results_file`  the results of `run`
==============  ===============================================================================
"""
