"""The engine: the broker's core together with a journal, without sockets.

==============  ============================================================
`engine`        one round: receive, decide, commit, dispatch
`compaction`    rewrites live records and deletes old segments
`disk_space`    reserves room for settlements and refuses starts on a full disk
==============  ============================================================
"""
