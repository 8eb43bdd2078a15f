"""What `scripts/fuzz.py` throws at a broker, and how it judges whether anybody was harmed.

`frames`: wrong frames without end, of a seed · `attacker`: processes that send them over raw sockets · `honest`:
peers that publish, work and settle meanwhile, and the judge of what they saw.
"""
