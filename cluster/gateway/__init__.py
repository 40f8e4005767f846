"""The gateway process. Its decision rules, such as the order of the queue, are pure code in cluster.policy.

The path of a call: apis/grpc/inference.py (bytes) -> calls/request.py (validated request) -> call_service.py (one call
from arrival to end) -> models/ (model) -> text/ (token ids) -> scheduling/scheduler.py (queueing and binding) ->
links/worker_link.py -> and back through calls/call.py (tokens become text) to apis/grpc/inference.py.
"""
