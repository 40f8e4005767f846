"""Chats with real engines, for the part `engines` of the scenario `routing`.

The package also compares the numbers of cached tokens that a gateway predicts with the numbers that the engines report.
"""
