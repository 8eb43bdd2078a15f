"""What the processes of a node share: exit codes, control channel, slots, pool specs.

Imports nothing of client, node or worker.
"""
