"""Readers of a journal on disk, which need no broker and write nothing.

==============  =========================================================================
`settlements`   counts accepted settlements, lists ended groups, loads an engine
`groups`        lists the groups that a batch of the journal names
==============  =========================================================================
"""
