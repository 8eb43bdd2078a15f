"""Connections of client, node and worker to the broker, and the data that they share through it.

==================  ==================================================================
`connect`           opens a connection; the one place where an address chooses the broker
`broker_process`    starts the broker process and restarts it when it ends
`errors`            translates errors of the broker into those of `stageflow_actors.errors`
`settlements`       builds the settlement of one delivery
`manifest`          the workflows and limits of a cluster, for clients
`pauses`            paused queues, as facts in the broker
`queue_info`        the figures of one queue
==================  ==================================================================
"""
