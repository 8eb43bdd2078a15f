"""The broker as a process of its own behind a ZeroMQ ROUTER socket, and its client.

==================  ==========================================================
`process`           the broker process: journal, engine, socket
`server`            the broker on its ROUTER socket: one thread, one loop
`client`            a connection over a DEALER socket
`access`            checks that only this user can connect to the socket
`socket_path`       the places of the socket, and a path that the kernel takes
`listening_socket`  keeps the socket at such a place
`private_dir`       checks that only this user can access a directory
==================  ==========================================================
"""
