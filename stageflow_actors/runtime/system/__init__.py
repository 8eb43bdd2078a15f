"""Processes, directories and limits of the operating system. Knows nothing of workflows.

================  ====================================================================
`processes`       how a process ended, and whether it still lives
`data_dir`        the data directory: its files, its lock, and the private socket directory
`restart_limit`   how often something may restart within a period
================  ====================================================================
"""
