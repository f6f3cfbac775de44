"""The verbs: each reads its arguments, checks them, calls the parts, and prints. Nothing imports this package."""
