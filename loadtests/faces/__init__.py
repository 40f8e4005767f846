"""Ways to ask a server for a stream of text; each file is one protocol behind the same small port."""

from loadtests.faces.base import Answer, CallFailed, Face, OnText, Request

__all__ = ["Answer", "CallFailed", "Face", "OnText", "Request"]
