"""The zygote: a warm, single-threaded process that forks the workers.

============  ==============================================================
`handle`      the node's side: requests workers, receives births and exits
`main`        the process itself
`protocol`    what the two exchange
============  ==============================================================
"""
