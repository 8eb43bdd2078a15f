"""Messages and queues; nothing here has heard of a workflow.

==============  =====================================================================
`api`           the port: what anybody may ask of a broker
`memory`        a broker in this process
`zeromq`        a broker process, and its client
`client`        a peer's side of the talk, without a transport
`engine`        one round: drain, commit, dispatch; `reclaim` space coming back
`core`          every decision, without I/O
`journal`       bytes that survive
`accounts`      what a journal at rest testifies to; `named` whom a batch of it speaks of
`testing`       the contract that every broker passes
`errors`        what may go wrong
==============  =====================================================================
"""
