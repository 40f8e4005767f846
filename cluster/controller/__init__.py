"""The controller process: runs and scales the catalog's models on Ray, and publishes the catalog to the gateways."""
