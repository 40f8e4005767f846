"""Clients that request a stream of text; each file is one protocol behind the same interface."""

from loadtests.faces.base import Answer, CallFailed, Face, OnText, Request

__all__ = ["Answer", "CallFailed", "Face", "OnText", "Request"]
