"""From a socket to the outbox: who may post, what is read, what is answered.

`guard` and `routes` take plain values and return plain answers; `server` is the only place that
knows the HTTP library.
"""
