"""Programs for those who work on mlxrun; a user of the package imports none of them."""
