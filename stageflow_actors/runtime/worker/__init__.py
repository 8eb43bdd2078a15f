"""A worker process: one stage actor that runs user code.

=====================  ==============================================================
`main`                 the process: loads the code, connects, runs the actor
`actor`                `StageActor`: handles messages one by one
`concurrent_actors`    actors that handle several messages at once
`mailbox`              passes batches from the connection to the actor
`stage_context`        `StageContext`, which handlers receive
`interceptors`         wraps the calls of user code
`executors`            one executor for each kind of message
=====================  ==============================================================
"""
