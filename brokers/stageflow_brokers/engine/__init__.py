"""The engine: the broker's core together with a journal, without sockets.

==============  ===================================================================
`engine`        one round: receive, decide, commit, dispatch
`compaction`    copies live records and deletes the oldest segment
`disk_space`    reserves space for work in hand, refuses starts on a full disk
==============  ===================================================================
"""
