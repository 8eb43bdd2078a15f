"""Readers of a journal at rest: no broker runs, and nothing is written.

==============  ==================================================================
`settlements`   counts accepted settlements per (group, epoch, label)
`groups`        lists the groups that a batch of the journal names
==============  ==================================================================
"""
