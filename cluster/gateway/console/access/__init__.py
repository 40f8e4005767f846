"""Sign-in to the console, its sessions, and what a session may do."""
