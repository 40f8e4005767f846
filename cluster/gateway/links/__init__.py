"""The gateway's end of the links that workers and controllers open."""
