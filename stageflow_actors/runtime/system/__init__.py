"""Processes, directories and limits of the operating system. This package must not know workflows.

===================  =================================================================
`processes`          kills processes, waits for their exit, describes it
`data_dir`           the data directory: its files, its lock, its cluster record
`socket_dir`         the private directory of the broker's socket
`interpreter_flags`  the program's `-O`, `-W`, `-X` … for child processes
`interpreter`        the interpreter of child processes, also for an embedded program
`surroundings`       surroundings that are refused: no /proc, patched threads
`start_guard`        places where no runtime may start: the import of a module by a worker
`restart_limit`      the number of restarts allowed within a period
`source_files`       the files of the program's own modules
===================  =================================================================
"""
