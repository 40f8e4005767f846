"""The ledger's database: connections, tables, migrations, backups, retention."""
