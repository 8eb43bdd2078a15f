"""The processes of a cluster, and the connections between them.

=============  ==============================================================
`runtime`      `Runtime`: the composition root, which puts the parts together
`config`       `Config`: the settings of a cluster
`node_handle`  starts the node process, and starts it again after a crash
`client`       the program: `Client`, `Instance`, results and events
`node`         the node process: supervisor, pools, coordinator
`worker`       the worker processes, which run user code
`messaging`    the connection to the broker, and the broker process
`zygote`       the process that forks the workers
`ipc`          data that node and workers exchange
`system`       processes, directories and limits of the operating system
=============  ==============================================================

Client, node and worker never import one another; import-linter checks the layers.
"""
