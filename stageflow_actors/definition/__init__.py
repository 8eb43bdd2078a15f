"""The definition of a workflow: pure data, checked when it is made.

- `duration`: seconds as users write them
- `retry`: retry policies
- `handler`: what a handler looks like and how it is called
- `stage`: `Stage`, `Compensation`, `Replace`
- `workflow`: `Workflow`
- `shipping`: definitions on their way to child processes

Nothing here knows of brokers, processes, clocks or files.
"""
