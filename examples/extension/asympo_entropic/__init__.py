"""An example of an objective in a package of its own."""
