"""Tracebacks of failed attempts, as they travel with an instance: `table`, compressed, equal ones once.

Their text is made in the worker. Only failed attempts pay for them: a message without a failure has none.
"""

from __future__ import annotations
