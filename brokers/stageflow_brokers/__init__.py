"""Brokers of messages and queues. This package knows nothing of workflows.

============  ==================================================================
`api`         the port: `Broker`, `Listener`; `admin` its administrative half
`types`       messages, settlements and options of the port; `errors` its errors
`memory`      a broker in the process of the caller
`zeromq`      a broker in a process of its own, and its client
`client`      the client side of the protocol, without a transport
`engine`      core and journal together: receive, decide, commit, dispatch
`core`        the decisions, without I/O
`journal`     the log on disk, which survives crashes
`offline`     readers of a journal while no broker runs
`testing`     the contract that every broker passes, and a simulated disk
`failpoints`  points at which a test stops or kills a process
============  ==================================================================
"""
