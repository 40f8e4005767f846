"""The words all other packages speak: frozen types, outcomes and ports. Imports nothing of ours.

The generated protobuf modules belong to this layer too; they lie at `cluster.v1`, `cluster.link.v1` and
`cluster.admin.v1`, where their proto packages put them.
"""
