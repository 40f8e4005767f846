"""The controller process: makes Ray run what the catalog says, scales it, and informs the gateways."""
