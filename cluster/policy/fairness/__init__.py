"""The fair order of waiting sequences between tenants, and what each tenant has been served."""
