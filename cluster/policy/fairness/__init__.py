"""Fair order of waiting sequences between tenants, and the service that each tenant has received."""
