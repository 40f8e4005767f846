"""Migrations. Each migration is one file, named r<number>_<subject>.py, with a KIND of `expand` or `contract`."""
