"""What a program holds: a client of the cluster, and its instances.

==================  ==============================================================
`client`            `Client`: submit, execute, map, queues, instances
`session`           `Session`: connection to the broker, history reader and known workflows
`instance`          `Instance`: status, result, cancel, retry, signal
`completion`        `Completion`: the outcome of one run, as one handle knows it
`reruns`            cancel, retry and restart of instances
`map_iterator`      `map` and `map_unordered`: a bounded number in flight
`progress_bar`      the progress bar of `map` and `stageflow run`
`fork_guard`        closes sessions in a forked child of the program
`waiters`           objects that wait for the outcomes of instances
`wait_reason`       what an instance waits for, in one sentence
`wait_notes`        the same of several instances, for calls that wait for many
`workflow_ref`      a workflow as object or id, and a start request
`conflicts`         starts whose instance id exists already
`event_stream`      events of the cluster; `event_decoder` makes them of frames
`output`            writes the output of handlers, and handles their log records
`drop_report`       counts dropped records and lines, for warnings
`remote_client`     a client of a cluster that another process runs
`attach`            finds the running cluster of a data directory
`offline_client`    a client of a data directory at rest
==================  ==============================================================
"""
