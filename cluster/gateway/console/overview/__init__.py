"""The overview: one document about the whole cluster, with the parts that it is made of and the changes that are
sent.
"""
