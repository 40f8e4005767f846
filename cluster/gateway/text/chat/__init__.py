"""Chat templates: the messages of a chat become one text."""
