"""Handling of a call and its sequences, from the parsed request to the last chunk."""
