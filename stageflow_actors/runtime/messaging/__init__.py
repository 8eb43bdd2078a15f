"""How client, node and worker talk to the broker and what they agree on.

==================  ==================================================================
`connect`           opens a connection; the one place where an address chooses the broker
`broker_process`    starts the broker process and watches it
`errors`            translates errors of the broker into those of `stageflow_actors.errors`
`settlements`       collects what a worker settles into one frame
`manifest`          which workflows and endpoints a cluster serves
`pauses`            paused queues, as facts in the broker
`queue_info`        the figures of one queue
==================  ==================================================================
"""
