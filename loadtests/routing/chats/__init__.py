"""Chats for the part `engines`, and the comparison of a gateway's predictions with the engines."""
