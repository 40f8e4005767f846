"""Migrations, one file each, named r<number>_<subject>.py. KIND is `expand` or `contract`."""
