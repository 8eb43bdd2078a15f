"""Messages and queues; nothing here has heard of a workflow."""
