"""Types, outcomes and ports that every other package uses. Imports no other package of this project.

The generated protobuf modules belong to this layer too. They are at `cluster.v1`, `cluster.link.v1` and
`cluster.admin.v1`, the paths that their proto packages prescribe.
"""
