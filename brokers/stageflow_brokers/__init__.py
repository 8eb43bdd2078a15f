"""Message brokers with durable queues. This package must not depend on workflows or `stageflow_actors`.

=============  ==================================================================
`api`          the port: `Broker`, `Listener`; `admin` its administrative half
`types`        messages, settlements and options of the port; `errors` its errors
`memory`       a broker in the process of the caller
`zeromq`       a broker in a separate process, and its client
`client`       the client side of the protocol, without a transport
`engine`       core and journal together: receive, decide, commit, dispatch
`core`         the decisions, without I/O
`journal`      the log on disk, which survives crashes
`offline`      readers of a journal that need no broker
`testing`      the contract that every broker passes, and a simulated disk
`log_sender`   sends the log records of a process to the one that collects them
`signals`      the signals of a new process; `resources` its limits
`pause_flags`  shared memory in which paused queues are marked
`failpoints`   places at which a test can stop or kill a process
=============  ==================================================================
"""
