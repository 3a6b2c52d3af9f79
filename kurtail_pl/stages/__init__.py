"""The steps of the road, one file each: every stage reads from disk what the one before wrote."""
