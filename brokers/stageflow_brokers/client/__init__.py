"""The client side of the broker protocol, without a transport.

================  ==================================================================
`connection`      one peer: numbers frames, sends them again, resolves their futures
`unconfirmed`     the frames that the broker has not confirmed yet
`query_admin`     the administrative operations, as queries over a connection
================  ==================================================================
"""
