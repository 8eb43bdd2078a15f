"""One executor for each kind of message: from the delivery to the settlement.

=====================  =====================================================
`registry`             `EXECUTORS`: the executor for each kind of place
`base`                 `Executor` and `ExecutorEnvironment`, which all share
`handler`              calls a handler with its services and its context
`stage`                a plain stage
`branch`               chooses an arm of a branch
`join`                 joins the branches of a parallel stage
`map`                  splits a map into items and joins them
`signal`               a signal that has arrived, or has timed out
`endpoint`             a command to an endpoint
`compensation`         a compensation, or the compensations of map items
`item_compensation`    the durable progress of compensations of map items
`versions`             one executor for several versions of a workflow
`set_field`            sets one field of a context
=====================  =====================================================
"""
