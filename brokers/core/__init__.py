"""The broker without I/O: commands and the time go in, records and replies come out."""
