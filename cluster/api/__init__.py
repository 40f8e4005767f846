"""Types, outcomes and ports that every other package uses. This package imports no other package of the project.

The generated protobuf modules belong to this layer too. The modules are at `cluster.v1`, `cluster.link.v1` and
`cluster.admin.v1`, as the names of the proto packages require.
"""
