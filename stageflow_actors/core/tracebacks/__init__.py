"""Tracebacks of failed attempts, as they travel with an instance and are stored.

============  =====================================================================
`table`       those of one instance, compressed, equal ones once
`references`  what stands for them in the history, which stores each one only once
============  =====================================================================

Their text is made in the worker. Only failed attempts pay for them: a message without a failure has none.
"""

from __future__ import annotations
