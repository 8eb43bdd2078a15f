"""Data that the processes of a node exchange.

=================  ===============================================================
`control_channel`  messages between program and node over a socket pair
`exit_codes`       exit codes of the processes
`failed_attempts`  how many failed attempts of a stage are logged, and how many only counted
`log_levels`       the program's logging set-up in shared memory
`output_frames`    the frames in which output and log records reach the program
`pool_spec`        the specification of a pool, and the code that its workers load
`slots`            shared memory in which a worker publishes its current message
`start_report`     the cause for which a worker cannot start
`stop_notes`       notices of a slow stop
=================  ===============================================================

This package must not import client, node or worker.
"""
