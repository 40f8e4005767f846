"""The door: bytes become a call, an outcome becomes a status. Calls wait here; nothing is decided here.

A call's way, top to bottom: grpc_face.py (bytes) -> wishes.py (what is asked, checked) -> service.py (one call from
arrival to end) -> directory.py (which model) -> text/ (tokens) -> dispatch.py (waiting and binding) -> cluster.link ->
and back through call.py (tokens become text) to grpc_face.py.
"""
