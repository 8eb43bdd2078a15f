"""The parts of `scripts/fuzz.py`.

`frames`: seeded wrong frames · `attacker`: processes that send them over raw sockets · `well_behaved_peer`: peers that
publish, work and settle at the same time, and the judge of their results.
"""
