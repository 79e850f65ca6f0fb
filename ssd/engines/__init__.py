"""One engine method: requests in, samples out as they finish, in any order.

`opening.open_engine` opens an engine by its name. An engine that cannot honour a decoding refuses it before the first
token.
"""
