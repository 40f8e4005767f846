"""The table of all admin methods, which the admin port and the console share."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from google.protobuf.descriptor import MethodDescriptor

from cluster.admin.v1 import admin_pb2, tenants_pb2, usage_pb2
from cluster.gateway.apis.admin.authorization import VERBS, AdminMethod, Method, Verb

ADMIN_FILES = (admin_pb2.DESCRIPTOR, tenants_pb2.DESCRIPTOR, usage_pb2.DESCRIPTOR)


def admin_methods(
    services: Mapping[str, object], forwarded: Callable[[MethodDescriptor, Verb], Method]
) -> Mapping[str, AdminMethod]:
    """Return all admin methods, keyed by their short names. `services`: objects with a function for each method, keyed
    by the short names of the services. `forwarded`: builds each method that the objects lack (forwarding.py)."""
    methods = {}
    for file in ADMIN_FILES:
        for service in file.services_by_name.values():
            for descriptor in service.methods:
                name = f"{service.name}.{descriptor.name}"
                act = getattr(services[service.name], descriptor.name, None)
                methods[name] = AdminMethod(descriptor, VERBS[name], act or forwarded(descriptor, VERBS[name]))
    return methods
