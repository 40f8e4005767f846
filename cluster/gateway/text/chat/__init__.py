"""Chat templates, which render the messages of a chat as one text."""
