"""Chats for the part `engines` of the scenario `routing`, which runs real engines, and a comparison of a gateway's
predictions with what the engines did."""
