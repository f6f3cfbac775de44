"""`arriero compare`: two runs against each other, as a table, a figure and a verdict."""
