"""One executor for each kind of message: from the delivery to the settlement.

=====================  ==================================================
`registry`             which executor handles which kind
`base`                 what all executors share
`handler`              calls a handler with its services and its context
`stage`                a plain stage
`branch`               chooses a branch
`join`                 joins the branches of a parallel group
`map`                  splits a map into items and joins them
`signal`               a signal or a delay that has arrived
`endpoint`             a request to an endpoint
`compensation`         a compensation; `item_compensation` those of a map
`versions`             which version of a workflow a message belongs to
`async_call`           calls coroutines on the worker's event loop
`set_field`            writes one field of a context
=====================  ==================================================
"""
