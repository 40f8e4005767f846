"""The gateway's end of the links, which workers and controllers open."""
