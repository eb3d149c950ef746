"""Small helper functions that all other folders of the package may import."""
