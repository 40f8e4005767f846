"""The door: bytes become a call, an outcome becomes a status. Calls wait here; nothing is decided here.

A call's way, top to bottom: inference.py (bytes) -> request.py (what is asked, checked) -> service.py (one call from
arrival to end) -> models.py (which model) -> text/ (tokens) -> scheduler.py (waiting and binding) -> cluster.link ->
and back through call.py (tokens become text) to inference.py.
"""
