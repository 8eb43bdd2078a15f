"""The mistakes that `scripts/mutants.py` plants, in a table per area of the code that they change.

`broker_core`: the broker's decisions · `broker_shell`: journal, engine and clients of a broker · `workers`: a worker
and its routing · `node`: the node and the zygote · `program`: a program's calls and the command line · `mutant`: one row
of a table. A new mistake is added at the end of the table of the code that it changes.
"""

from __future__ import annotations

from mutating import broker_core, broker_shell, node, program, workers

MUTANTS = (*broker_core.MUTANTS, *broker_shell.MUTANTS, *workers.MUTANTS, *node.MUTANTS, *program.MUTANTS)
