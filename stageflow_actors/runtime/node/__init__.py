"""The node process: supervisor, pools and coordinator of one cluster. It must never run user code.

=======================  ============================================================
`main`                   the process: starts the parts in order, stops them in reverse
`supervisor`             keeps the zygote and the pools alive
`pool`                   starts, watches, replaces and scales one queue's workers
`exit_policy`            decides what follows from the exit of a worker
`worker_handle`          the state of one worker, as its pool knows it
`pool_context`           the parts that all pools share
`pool_events`            the messages that the supervisor sends to a pool
`pool_starts`            when a pool's next worker starts, and why one is not ready
`start_back_off`         the delay before the next try of workers that cannot start
`start_causes`           why workers of the node cannot start, each cause reported once
`load_watch`             which pools have loaded their code
`memory_limits`          memory use of workers, and the kernel's count of OOM kills
`source_watch`           warns of modules that change on disk
`output_relay`           passes output and log records of workers on to the program
`program_channel`        the connection on which they are sent
`coordinator`            handles failures, ends instances, writes the history
`error_log`              logs failed instances and dead letters
`orphans`                messages of versions that are not registered
`history_consistency`    checks that journal and history belong together
=======================  ============================================================
"""
