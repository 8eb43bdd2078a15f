"""What `scripts/torture.py` and the tests of the journal do to a journal, and how they judge what is left of it.

`plant`: a real broker engine that makes the journal · `bytes`: cuts, lost sectors and flipped bits of a journal at
rest · `faults`: a disk that fails at its n-th call · `crashes`: every order in which a crash may lose what was not
synced. All of it on disks in memory; nothing here touches a file.
"""
