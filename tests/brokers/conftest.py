"""A filled data directory for the tests that read a journal at rest."""

from filled_data_dir import filled

__all__ = ["filled"]
