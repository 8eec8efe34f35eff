"""ChargeOver: the REST API of an account, and how it bills."""
