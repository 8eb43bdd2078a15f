"""The commands of `stageflow`, each in the file of its name.

====================  ==========================================================================================
`run`, `start`, `up`  start instances, or a cluster
`instances`           list, show, export (`export`), signal (`signal`), cancel, retry, restart (`instance_runs`)
`queue`, `dlq`        queues and dead letters
`journal`, `history`  the files of a cluster: verify, compact, repair, prune
`stats`, `cluster`    figures; scale and health
`graph`, `doctor`     a workflow as Mermaid text; checks of a cluster
====================  ==========================================================================================
"""
