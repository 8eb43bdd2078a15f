"""The broker as a process of its own behind one ZeroMQ ROUTER, and its client. `door`: who may come to its socket."""
