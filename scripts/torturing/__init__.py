"""The parts of `scripts/torture.py` and of the tests of the journal: damage to a journal, and checks of the result.

`workload`: a real broker engine that writes the journal · `sample_journal`: a finished journal, to copy and damage ·
`journal_at_rest`: cuts, lost sectors and flipped bits · `scenarios`, `faults`: a disk that fails at its n-th call ·
`crashes`: each order in which a crash may lose unsynced writes. All disks are in memory; no file is touched.
"""
