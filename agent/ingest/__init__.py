"""From a socket to the outbox: who may post, what is read, what is answered.

`guard`, `wire` and `routes` take plain values and return plain ones; `sockets`, `connection` and
`server` are the shell around them that knows the event loop.
"""
