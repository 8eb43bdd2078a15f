"""The broker without I/O: commands and the time go in, records and replies come out.

===============  ======================================================================================
`machine`        one round: who is known, which frame comes next; puts the parts below together
`publishing`     what comes in from outside, and what is refused
`settling`       what ends, and what follows from it
`bounds`         how much one peer may ask for
`gathering`      joins, signals, deadlines
`leases`         credit, delivery, return, adoption after a restart
`supervision`    deaths, roster, hold, recall and retire
`admin`          named queries that change something; `looking` those that do not; `watching` who is told
`ledger`         the records of a round and where they lie; `records` what they are
`talk`           what peers are to be told, until it may leave; `sessions` what is known of them
`replay`         from records back to state
`store`          the state, and the primitive changes that live broker and replay share
`queue`          one queue; `breaker` when it rests
`message`        messages and groups; `gather` one gather
`wire`           the grammar of frames
===============  ======================================================================================
"""
