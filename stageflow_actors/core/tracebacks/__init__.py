"""Tracebacks of failed attempts: their text, and how they travel with an instance.

`table` holds those of an instance, compressed, equal ones once. Their text is made in the worker.

Only failed attempts pay for them: a message without a failure has none.
"""

from __future__ import annotations
