"""Clients that request a stream of text. Each file is a client for one protocol; all clients have the same
interface.
"""

from loadtests.faces.base import Answer, CallFailed, Face, OnText, Request

__all__ = ["Answer", "CallFailed", "Face", "OnText", "Request"]
