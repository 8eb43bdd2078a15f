"""Checks of a cluster, its data directory and this machine.

===============  ==================================================================
`health`         whether the broker, the coordinator and all pools of a cluster work
`doctor`         whether the invariants of a data directory hold
`environment`    whether this machine can run a cluster
===============  ==================================================================
"""
