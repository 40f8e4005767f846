"""Data types, outcomes of calls and ports (interfaces) that all other packages use. This package imports no other
package of the project.

The generated protobuf modules belong to this layer too. They are at `cluster.v1`, `cluster.link.v1` and
`cluster.admin.v1`, because a generated module must be at the path of its proto package.
"""
