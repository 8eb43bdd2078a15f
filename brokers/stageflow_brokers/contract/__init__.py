"""What every broker has to do, as tests; see `stageflow_brokers.testing`, which puts them together.

============  ==========================================================
`harness`     a hub to connect to, a peer that remembers what it hears
`delivery`    publishing, order, credit, priority, return
`settlement`  leases, transitions, retries, dead letters, checkpoints
`grouping`    idempotent starts, ends, watches, epochs
`gathering`   joins, signals, deadlines
`rerunning`   cancelling, halting, beginning anew
`oversight`   deaths, hold, recall and retire
`operation`   pause, purge, peek, stats, facts, limits
============  ==========================================================
"""
