"""A worker process: one stage actor that runs user code.

=====================  ==============================================================
`main`                 the process: loads the code, connects, runs the actor
`actor`                `StageActor`: handles messages one by one
`concurrent_actors`    actors that handle several messages at once
`prefetch`             how many messages a worker asks for, by the time that they take
`mailbox`              passes batches from the connection to the actor
`output`               the standard streams and the logging of the worker
`current_attempt`      the attempt in work, for the attributes of log records
`traceback_text`       from an exception of user code to the text of its traceback
`failure_log`          the log record of each failed attempt
`event_loop`           the event loop of async user code, and the turns of messages on it
`awaitables`           awaitables that user code returns
`base_context`         the context variables of which each message gets a copy
`stage_context`        `StageContext`, which handlers receive
`interceptors`         wraps the calls of user code
`services`             `ServiceScope`: makes the services of a worker and closes them
`start_reporter`       reports why the worker cannot start, to the node
`process_exit`         the end of the process, as that of a Python program
`executors`            one executor for each kind of message
=====================  ==============================================================
"""
