"""From a socket to the outbox: who may post, what is read, what is answered.

`guard` and `wire` take plain values and return plain ones; `routes` answers at once or says what
its answer waits for (`reply`), to each app in the words of its API (`dialect`); `sockets`,
`connection` and `server` are the shell around them.
"""
