"""Arrow tables on disk or in memory, and the processes that fill them."""
