"""The shell around the pure parts: actors, pools, processes, and the one place where they are put together."""
