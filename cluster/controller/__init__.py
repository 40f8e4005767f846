"""The controller process: runs the catalog's models on Ray, scales them, and publishes the catalog to the gateways."""
