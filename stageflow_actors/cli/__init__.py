"""The `stageflow` command: click commands over the runtime's client, and nothing that decides."""
