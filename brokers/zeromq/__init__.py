"""The broker as a process of its own behind one ZeroMQ ROUTER, and its client."""
