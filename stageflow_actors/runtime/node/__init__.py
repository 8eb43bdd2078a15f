"""The node process: supervisor, pools and coordinator. It runs no user code.

=======================  ============================================================
`main`                   the process: starts the parts, stops them in reverse
`supervisor`             starts, restarts and stops the pools
`pool`                   one queue's workers: start, watch, scale, restart
`exit_policy`            decides what follows the exit of a worker
`worker_handle`          one worker as its pool sees it
`pool_context`           what all pools share
`pool_events`            the messages of a pool's inbox
`pool_pause`             when a pool pauses its queue
`memory_limits`          workers over their memory limit
`stderr_relay`           passes on what workers write to stderr
`coordinator`            drives compensations, ends instances, writes the history
`orphans`                messages that no pool of this node consumes
`history_consistency`    whether journal and history belong together
=======================  ============================================================
"""
