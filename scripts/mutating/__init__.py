"""The mistakes that `scripts/mutants.py` plants, in a table per area of the code that they change.

`broker_core`: the broker's decisions · `broker_shell`: journal, engine and clients of a broker · `workers`: a worker
and its routing · `node`: the node and the zygote · `supervision`: sizes of pools, births, rows of the history ·
`program`: a program's calls and the command line · `sharing`: priority, pause and idle workers · `mutant`: one row of a
table. A new mistake is added at the end of the table of the code that it changes.
"""

from __future__ import annotations

from mutating import broker_core, broker_shell, node, program, sharing, supervision, workers

TABLES = (broker_core, broker_shell, workers, node, supervision, program, sharing)

MUTANTS = tuple(mutant for table in TABLES for mutant in table.MUTANTS)
