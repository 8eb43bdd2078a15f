"""The zygote: a warm, single-threaded process that forks the workers.

============  ==============================================================
`handle`      the node's side: requests workers, receives starts and exits
`main`        the zygote process
`protocol`    the messages between node and zygote
============  ==============================================================
"""
