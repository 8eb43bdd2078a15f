"""The broker without I/O: commands and the time go in, records and replies come out.

===============  =======================================================================
`machine`        one round: identifies peers, orders frames, calls the handlers below
`publish`        new messages: accepts or refuses them
`settle`         settlements, and the messages that follow from them
`gathers`        joins, signals, deadlines; `gather` is one of them
`leases`         credit, delivery, release, adoption after a restart
`recalls`        messages that consumers hold and have not begun, asked for again
`supervision`    deaths, roster, suspended deliveries, recall and retire
`admin`          queries that change state; `inspector` those that do not
`watches`        peers that are notified of the end of groups
`outbox`         frames to peers, held until their records are durable
`sessions`       the state of each peer
`limits`         limits of what one peer may send
`state`          messages, groups, queues, gathers, facts, and their primitive changes
`queue`          one queue; `breaker` its circuit breaker
`message`        messages and groups, and their location in the journal
`record_writer`  the records of a round; `records` their format
`replay`         from records back to state
`audit`          a consistent picture of the state, and its contradictions
`wire`           the format of frames
===============  =======================================================================
"""
